"""Meshes: each operation gives the masks of one device, sharded as its leaves, and gathers no leaf.

Two processes give the same masks.
"""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import collectives, mesh, place, slow_unless
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from two_processes import digests

import jaxprune as jp
from jaxprune import _tree

LAYOUTS = {  # a new layout adds one entry here: the mesh, and where every leaf is on it
    "data": ({"data": 8}, {"up": P(), "bias": P(), "down": P()}),
    "fsdp": ({"data": 8}, {"up": P("data"), "bias": P("data"), "down": P(None, "data")}),
    "tensor": (
        {"data": 4, "model": 2},
        {"up": P("data", "model"), "bias": P("model"), "down": P(None, "model", "data")},
    ),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SIZE = 512  # the weights of a matrix, of each: shards split every unit of some patterns below


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": jax.random.normal(keys[0], (16, 32)),
        "bias": jax.random.normal(keys[1], (32,)),
        "down": jax.random.normal(keys[2], (2, 32, 8)),
    }


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["up"] + params["bias"][None])
    return jnp.einsum("nh,khc->nkc", hidden, params["down"])


@functools.cache
def groups():
    return jp.find_groups(apply_fn, network(), jnp.ones((8, 16)))


def steps(link):
    def run(params):
        state = link.init(params)
        for _ in range(2):
            updates, state = link.update(params, state, params)
            params = optax.apply_updates(params, updates)
        masks = jp.get_masks(state)
        return masks, {k: (params[k] != 0) | masks[k] for k in masks if masks[k] is not None}

    return run


def magnitude(select, **options):
    return lambda params: select(jp.scores.magnitude(params), **options)


select, patterns = jp.select, jp.patterns
halved = functools.partial(jp.select, sparsity=0.5)
OPERATIONS = {  # a new one adds one entry here: params to masks, or to what has their structure
    "global": magnitude(select, sparsity=0.6),
    "layer": magnitude(select, sparsity=0.6, scope="layer"),
    "standardized": lambda p: halved(jp.scores.standardized_magnitude(p)),
    "random": lambda p: halved(jp.scores.random(p, jax.random.key(0))),
    "erk": magnitude(select, sparsity=0.6, scope="erk"),
    "path": magnitude(select, sparsity=0.2, scope={"up": 0.7}),
    "2:4": magnitude(select, pattern=patterns.n_of_m(2, 4)),
    "n:8": magnitude(select, sparsity=0.6, pattern=patterns.n_of_m(None, 8, -1)),
    "block": magnitude(select, sparsity=0.5, pattern=patterns.block((4, 4))),
    "uneven block": magnitude(select, sparsity=0.5, pattern=patterns.block((5, 3))),
    "axis": magnitude(select, sparsity=0.5, pattern=patterns.axis(-1)),
    "axes": magnitude(select, sparsity=0.5, pattern=patterns.axis(-2, -1)),
    "within": lambda p: select(
        jp.scores.magnitude(p), 0.8, within=halved(jax.tree.map(jnp.cos, p))
    ),
    "iteratively": lambda p: jp.select_iteratively(jp.scores.magnitude, p, 0.8, rounds=3),
    "enforce": steps(jp.enforce(optax.sgd(1e-2), magnitude(halved))),
    "gradual": steps(
        jp.gradual(
            optax.adam(1e-2),
            jp.scores.magnitude,
            jp.schedules.linear(0.8, 0, 1),
            select=functools.partial(select, pattern=patterns.n_of_m(None, 4)),
        )
    ),  # fmt: skip
    "units": lambda p: groups().select(jp.scores.magnitude(p), 0.5, reduce="first"),
    "units by layer": lambda p: groups().select(
        jp.scores.magnitude(p), 0.5, scope="layer", round_to=8
    ),
    "units within": lambda p: groups().select(
        jp.scores.magnitude(p), scope={"up": 0.75}, within=groups().masks(np.arange(32) % 4 > 0)
    ),
    "gradual units": steps(
        jp.gradual(
            optax.sgd(1e-2),
            jp.scores.magnitude,
            jp.schedules.linear(0.5, 0, 1),
            select=lambda *a, **k: groups().select(*a, **k),
        )
    ),  # fmt: skip
    "combine": lambda p: jp.masks.combine(
        halved(jp.scores.magnitude(p)), halved(jax.tree.map(jnp.cos, p))
    ),
    "unpack": lambda p: jp.masks.unpack(jp.masks.pack(jax.tree.map(lambda w: w > 0, p)), p),
    "movement": lambda p: jp.movement.apply(p, p, jp.movement.masks(p, 0.4)),
    "gates": lambda p: jp.gates.masks(p),
    "slimming": lambda p: link(jp.regularizers.slimming(0.5, where=lambda path, w: True), p),
    "growing": lambda p: link(jp.regularizers.growing(halved(p), 0.5, 1), p),
}


def link(transformation, params):
    return transformation.update(params, transformation.init(params), params)[0]


@functools.cache
def on_one_device(name):
    return jax.device_get(OPERATIONS[name](network()))  # eager: one program for many operations


def spread(layout, kind):
    sizes, specs = LAYOUTS[layout]
    on = mesh(KINDS[kind], **sizes)
    return on, place(network(), on, specs)


def large(compiled):
    """Returns the collectives of a program that send at least as much as a leaf."""
    sent = collectives(compiled.as_text())
    return [c for c in sent if any(array.size >= SIZE for array in c.arrays)]


def check(result, expected, placed):
    leaves, others = _tree.named_leaves(result), _tree.named_leaves(expected)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, leaf), (_, other) in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=path)
        sharding = placed[path.split("/")[-1]].sharding
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (path, leaf.sharding)


EVERYWHERE = ("2:4", "units")  # others on two of the six meshes, because compiling takes long
TWO = (("fsdp", "auto"), ("tensor", "explicit"))
CASES = [
    (name, layout, kind)
    for name in OPERATIONS
    for layout in LAYOUTS
    for kind in KINDS
    if name in EVERYWHERE or (layout, kind) in TWO
]
ONCE = ("global", "erk", "uneven block", "axis", "iteratively", "gradual", "unpack", "growing")
FAST = [(name, *on) for name in EVERYWHERE for on in TWO] + [(name, *TWO[0]) for name in ONCE]


@pytest.mark.parametrize("name, layout, kind", slow_unless(FAST, CASES))
def test_operation_on_a_mesh(name, layout, kind):
    _, placed = spread(layout, kind)
    compiled = jax.jit(OPERATIONS[name]).lower(placed).compile()
    check(compiled(placed), on_one_device(name), placed)
    assert not large(compiled)


def test_a_gather_is_seen():
    _, placed = spread("fsdp", "auto")
    gather = jax.jit(lambda p: p["up"].reshape(-1)[::-1].reshape(32, 16) @ p["up"])
    assert large(gather.lower(placed).compile())


def test_collectives_are_read():
    text = """
  %all-reduce.1 = (f32[]{:T(128)}, bf16[2,4]{1,0}) all-reduce(%a, %b), channel_id=3, to_apply=%add
  %start.2 = (f32[2,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) all-gather-start(%c), channel_id=12
  %done.3 = f32[8,4]{1,0} all-gather-done(%start.2)
  %fusion.4 = pred[8]{0} fusion(%d), calls=%all-to-all
"""
    reduce, gather = collectives(text)
    assert (reduce.kind, reduce.channel, gather.kind, gather.channel) == (
        "all-reduce", 3, "all-gather", 12,
    )  # fmt: skip
    assert list(map(str, reduce.arrays + gather.arrays)) == ["f32[]", "bf16[2,4]", "f32[8,4]"]
    assert [a.nbytes for a in reduce.arrays + gather.arrays] == [4, 16, 128]


def placed_network(on):
    """Returns the function as a user writes it for a mesh with explicit axes."""
    everywhere, rows = NamedSharding(on, P()), NamedSharding(on, P("data"))

    def fn(params, x):
        params = {k: jax.sharding.reshard(params[k], everywhere) for k in ("up", "bias", "down")}
        return apply_fn(params, x)

    return fn, jax.device_put(jnp.cos(jnp.arange(128.0)).reshape(8, 16), rows)


def normalized(groups):
    return lambda p, x: jp.units.reduce(groups, jp.scores.magnitude(p), normalize="max")


@pytest.mark.parametrize("kind", slow_unless(["explicit"], KINDS))
def test_structure_on_a_mesh(kind):
    on, placed = spread("tensor", kind)
    fn, x = placed_network(on) if kind == "explicit" else (apply_fn, jnp.ones((8, 16)))
    here = network(), np.asarray(x)
    loss = lambda p, x: jnp.mean(fn(p, x) ** 2)
    plain = lambda p, x: jnp.mean(apply_fn(p, x) ** 2)
    with jax.set_mesh(on):
        on_mesh = jp.find_groups(fn, placed, x)
        assert on_mesh.groups[0].members == groups().groups[0].members
        for score, expected in (
            (jp.units.taylor_gates(on_mesh, loss), jp.units.taylor_gates(groups(), plain)),
            (jp.units.taylor(on_mesh, loss), jp.units.taylor(groups(), plain)),
            (jp.units.activation(on_mesh, fn), jp.units.activation(groups(), apply_fn)),
            (jp.search.oracle(on_mesh, loss), jp.search.oracle(groups(), plain)),
            (normalized(on_mesh), normalized(groups())),
        ):
            np.testing.assert_allclose(score(placed, x), expected(*here), rtol=1e-3, atol=1e-5)
        curved = jp.scores.fisher(loss)(placed, x)["up"]  # one example of a sharded batch at a time
        assert curved.sharding.is_equivalent_to(placed["up"].sharding, 2)
        expected = jp.scores.fisher(plain)(*here)["up"]
        np.testing.assert_allclose(curved, expected, rtol=1e-3, atol=1e-5)
        for cost in ("params", "flops"):
            masks = on_mesh.select(jp.scores.magnitude(placed), 0.3, cost=cost)
            check(masks, groups().select(jp.scores.magnitude(here[0]), 0.3, cost=cost), placed)
        small_fn, small, plan = jp.shrink(fn, placed, on_mesh.select(placed, 0.5), x)
        assert not plan.inexact and small["up"].shape == (16, 16)
        for path, leaf in small.items():  # 16 units on 2 and on 4 devices
            assert leaf.sharding.is_equivalent_to(placed[path].sharding, leaf.ndim), path
        state = optax.adam(1e-3).init(placed)
        assert plan.take(state)[0].mu["up"].sharding == small["up"].sharding
        back = plan.put(small)
        assert back["up"].sharding.is_equivalent_to(placed["up"].sharding, 2)
        _, small, _ = jp.shrink(fn, placed, on_mesh.select(placed, 0.5 + 1 / 32), x)
    assert small["up"].shape == (16, 15)  # which the two devices along "model" cannot divide
    assert small["up"].sharding.is_equivalent_to(NamedSharding(on, P("data")), 2)


def test_arrays_on_different_devices_are_named():
    _, placed = spread("fsdp", "auto")
    scores = jp.scores.magnitude(placed) | {
        "down": jax.device_put(jnp.ones((2, 2)), jax.devices()[1])
    }
    with pytest.raises(ValueError, match="^up: lies on other devices .*than down .*Put all arrays"):
        jp.select(scores, 0.5)
    masks = jax.device_put(jax.tree.map(lambda w: w > 0, network()), jax.devices()[0])
    with pytest.raises(ValueError, match="^the mask of bias: lies on other devices"):
        jp.apply_masks(placed, masks)


@pytest.mark.slow
def test_two_processes_select_the_masks_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = os.path.dirname(os.path.dirname(jp.__file__))
    env = {**os.environ, "PYTHONPATH": root, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    script = os.path.join(os.path.dirname(__file__), "two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(i), "2"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        expected = list(digests())
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            assert [line for line in out.splitlines() if line.startswith("mask: ")] == expected
    finally:
        for process in processes:
            process.kill()
