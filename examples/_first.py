"""Measures first calls in new processes, where each program has yet to be compiled."""

import _plain
import jax
import jax.numpy as jnp
import optax
from _bench import Row, in_new_process, paired, seconds
from _networks import VGG16, ResNet50, ViT, initialise

import jaxprune as jp

NETWORKS = {
    "ResNet-50": lambda tiny: ResNet50(8) if tiny else ResNet50(),
    "ViT-S/16": lambda tiny: ViT(24, 3, 2) if tiny else ViT(),
    "VGG-16": lambda tiny: VGG16(4) if tiny else VGG16(),
}


def first(n, counts, networks, size, repeats):
    """Calls functions for the first time in a process, on arrays of eight shapes or on networks.

    The reference of `select` is NumPy's partition, in jit a jitted sort; that of a first step is
    plain Adam, and of `groups.select` and `shrink` the dense network.
    """
    for count in counts:
        yield from in_new_process(on_arrays, n, count, repeats)
    for name in networks:
        yield from in_new_process(on_network, name, size, size < 100)


def arrays_of_eight_shapes(n, count):
    """Returns random arrays with about n weights in total."""
    keys = jax.random.split(jax.random.key(0), count)
    widths = [64 + 16 * (i % 8) for i in range(count)]
    rows = max(n // sum(widths), 1)
    return [jax.random.normal(key, (rows, width)) for key, width in zip(keys, widths, strict=True)]


def on_arrays(n, count, repeats):
    """Measures selections, and the first step of an optimizer."""
    weights = arrays_of_eight_shapes(n, count)
    scores = [jnp.abs(w) for w in weights]

    def row(name, ours, plain):
        return Row("first", name, count, ours, plain, ours / plain)

    def direct():
        return jp.select(scores, 0.9)

    def plain():
        return _plain.partition(scores)

    rows = [row("select", seconds(direct), seconds(plain))]
    rows.append(Row("first", "select, later calls", count, **paired(direct, plain, repeats)))
    sort = seconds(lambda: jax.jit(_plain.masks)(scores))
    ours = seconds(lambda: jax.jit(lambda s: jp.select(s, 0.9))(scores))
    rows.append(row("jit(select)", ours, sort))

    def step(tx):
        state = tx.init(weights)
        return seconds(lambda: jax.jit(tx.update)(weights, state, weights))

    adam, schedule = optax.adam(1e-3), jp.schedules.one_shot(0.9)
    plain_step = step(adam)
    pruning = step(jp.gradual(adam, jp.scores.magnitude, schedule))
    rows.append(row("what gradual adds to a step, by a sort", pruning - plain_step, sort))
    return rows


def on_network(name, size, tiny):
    """Measures `groups.select` and `shrink`, which runs both networks to verify."""
    model = NETWORKS[name](tiny)
    x = jnp.ones((1, size, size, 3))
    params = initialise(model, x)
    plain = seconds(lambda: jax.jit(model.apply)(params, x))
    groups = jp.find_groups(model.apply, params, x)
    scores = jp.scores.magnitude(params)
    masks = None

    def select():
        nonlocal masks
        masks = groups.select(scores, 0.5, scope="layer")
        return masks

    def shrink(verify):
        small_fn, small, _ = jp.shrink(model.apply, params, masks, x, verify=verify)
        return small_fn, small

    selecting = seconds(select)
    shrinking = seconds(lambda: shrink(False)[1])
    small_fn, small = shrink(False)
    small_call = seconds(lambda: small_fn(small, x))
    verifying = seconds(lambda: shrink(True)[1]) - small_call
    return [
        Row("first", f"{name}, {call}", None, ours, plain, ours / plain)
        for call, ours in (
            ("groups.select", selecting),
            ("shrink, without verifying", shrinking),
            ("shrink, without the small network", verifying),
        )
    ]
