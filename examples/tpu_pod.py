"""Compiles pruning of 7B and 70B decoders for TPU pods: memory per chip, and collectives.

Nothing runs, and no TPU is needed: params are shapes, and `libtpu` contains the compiler. Params
and the moments of Adam are float32 and sharded over both axes of the mesh. The batch has a sequence
of 1024 tokens for each row of chips, and is sharded over the first axis. A v5e chip has 16 GiB.
The environment variable JAX_OPTIMIZATION_LEVEL=O0 halves the compile time, but changes the memory.

    pip install "jax[tpu]"
    python examples/tpu_pod.py
    python examples/tpu_pod.py --models 7B --topology v5e:8x8 --programs select
"""

import argparse
import collections
import importlib.util
import json
import math
import os
import re
import sys
import time

os.environ.update(  # describes a TPU, so that libtpu asks no server and waits for no process
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    | os.environ
)

import jax
import jax.numpy as jnp
import optax
from _collectives import collectives
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

MODELS = {  # the pod to compile for, and sizes as in Llama 2
    "tiny": ("v5e:2x2", {"layers": 2, "width": 256, "hidden": 512, "heads": 2, "groups": 2}),
    "7B": ("v5e:4x4", {"layers": 32, "width": 4096, "hidden": 11008, "heads": 32, "groups": 32}),
    "70B": ("v5e:16x16", {"layers": 80, "width": 8192, "hidden": 28672, "heads": 64, "groups": 8}),
}
PROGRAMS = ["select", "SynFlow", "Adam", "gradual"]
VOCABULARY, HEAD, LENGTH = 32000, 128, 1024


def abstract_params(mesh, layers, width, hidden, heads, groups):
    """Returns the shapes of a decoder with stacked layers, its matrices sharded over the mesh."""

    def leaf(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def into(size):
        return leaf((layers, width, size), None, "data", "model")

    def back(size):
        return leaf((layers, size, width), None, "model", "data")

    return {
        "embed": leaf((VOCABULARY, width), "model", "data"),
        "layers": {
            "norm1": leaf((layers, width)),
            "query": into(heads * HEAD),
            "key": into(groups * HEAD),
            "value": into(groups * HEAD),
            "out": back(heads * HEAD),
            "norm2": leaf((layers, width)),
            "gate": into(hidden),
            "up": into(hidden),
            "down": back(hidden),
        },
        "norm": leaf((width,)),
        "logits": leaf((width, VOCABULARY), "data", "model"),
    }


def normalized(x, scale):
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-5).astype(x.dtype) * scale[None, None]


def decoder(mesh):
    """Returns a function of params and tokens (batch, time) that computes bfloat16 logits."""

    def sharded(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

    def layer(x, params):
        w = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        h = normalized(x, w["norm1"])
        query, key, value = (
            (h @ w[name]).reshape(*h.shape[:2], -1, HEAD) for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + attended.reshape(*h.shape[:2], -1) @ w["out"]
        h = normalized(x, w["norm2"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return sharded(x, "data"), None

    def apply_fn(params, tokens):
        x = sharded(params["embed"].astype(jnp.bfloat16)[tokens], "data")
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        x = normalized(x, params["norm"].astype(jnp.bfloat16))
        return x @ params["logits"].astype(jnp.bfloat16)

    return apply_fn


def select(scores, sparsity, within=None):
    return jp.select(scores, sparsity, within=within, where=lambda path, _: "norm" not in path)


def placed(state, params, mesh):
    """Gives arrays with the path and shape of a param its sharding, and replicates the others."""
    name = jax.tree_util.keystr
    leaves = {name(path): w for path, w in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, x):
        ends = (leaves.get(name(path[i:])) for i in range(len(path)))
        like = next((w for w in ends if w is not None and w.shape == x.shape), None)
        sharding = NamedSharding(mesh, P()) if like is None else like.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def lowered(program, mesh, params):
    """Traces a program on abstract arguments."""
    apply_fn = decoder(mesh)

    def tokens(length):
        shape, sharding = (mesh.shape["data"], length), NamedSharding(mesh, P("data"))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def loss(params, tokens):
        logits = apply_fn(params, tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def once(params):
        return select(jp.scores.magnitude(params), 0.9)

    def synflow(params, tokens):
        score = jp.scores.synflow(apply_fn)
        return jp.select_iteratively(score, params, 0.9, tokens, rounds=100, select=select)

    if program == "select":
        return jax.jit(once).lower(params)
    if program == "SynFlow":
        return jax.jit(synflow).lower(params, tokens(8))
    tx = optax.adam(1e-4)
    if program == "gradual":
        schedule = jp.schedules.cubic(0.9, begin=100, end=1000)
        tx = jp.gradual(tx, jp.scores.magnitude, schedule, every=100, select=select)

    def step(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    state = placed(jax.eval_shape(tx.init, params), params, mesh)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens(LENGTH))


def exchanges(text):
    """Counts how often chips exchange which arrays, by kind: those of a chip, as `bf16[1,4096]`."""
    # A TPU's text repeats a collective in each fusion that overlaps it, with the same channel.
    sent = {c.channel: (c.kind, " ".join(map(str, c.arrays))) for c in collectives(text)}
    sent.pop(None, None)
    return collections.Counter(sent.values())


def are_scalars(arrays, chips):
    """Returns whether all arrays are scalars; a TPU sums 64-bit scalars in one slot per chip."""
    slots = f"u32[{chips}]", f"f32[{chips}]"
    return all(x in slots or re.fullmatch(r"\w+\[[1,]*\]", x) for x in arrays.split())


def measure(model, topology, program):
    """Compiles a program; returns its sizes in GiB per chip and its collectives, for JSON."""
    pod = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    chips = len(pod.devices)
    width = 2 ** (int(math.log2(chips)) // 2)
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((chips // width, width), ("data", "model"), types, devices=pod.devices)
    params = abstract_params(mesh, **MODELS[model][1])
    start = time.perf_counter()
    compiled = lowered(program, mesh, params).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + new_outputs + memory.temp_size_in_bytes
    sent = [(*key, n) for key, n in exchanges(compiled.as_text()).items()]
    return {
        "model": model,
        "params": sum(w.size for w in jax.tree.leaves(params)),
        "topology": topology,
        "chips": chips,
        "program": program,
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes / 2**30,
        "outputs": new_outputs / 2**30,
        "temporary": memory.temp_size_in_bytes / 2**30,
        "total": total / 2**30,
        "arrays": [key for key in sent if not are_scalars(key[1], chips)],
        "scalars": [key for key in sent if are_scalars(key[1], chips)],
    }


def counts(sent):
    """Formats the number of collectives of each kind."""
    totals = collections.Counter()
    for kind, _, n in sent:
        totals[kind] += n
    return ", ".join(f"{n} {kind}" for kind, n in sorted(totals.items())) or "-"


def heading(result):
    return (
        f"\n{result['model']}, {result['params']:,} params on {result['topology']}, GiB per chip\n"
        "program  compiled  arguments  outputs  temporary   total  collectives: scalars; arrays"
    )


def row(result):
    return (
        f"{result['program']:<8} {result['seconds']:>6.0f} s {result['arguments']:>10.2f} "
        f"{result['outputs']:>8.2f} {result['temporary']:>10.2f} {result['total']:>7.2f}  "
        f"{counts(result['scalars'])}; {counts(result['arrays'])}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B", "70B"])
    parser.add_argument("--topology", help="such as v5e:8x8; default: by model")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", help="file for the figures and all collectives")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, the compiler for TPUs, is missing: pip install 'jax[tpu]'")
    table = []
    for model in args.models:
        for i, program in enumerate(args.programs):
            result = measure(model, args.topology or MODELS[model][0], program)
            if i == 0:
                print(heading(result))
            print(row(result), flush=True)
            table.append(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(table, file)


if __name__ == "__main__":
    main()
