"""Fuzzes shrinking: ``python tests/fuzz_programs.py --cases 300``.

A case is a network of layers drawn by chance, whose features are zero, equal or different from one
another once masked. In float64 the shrunk network must be the masked one, and so must its gradient.
"""

import argparse
import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close
from jax import lax

import jaxprune as jp

SIZE = 12  # the number of features of every value


def mean(x, axis=-1):
    return x.mean(axis, keepdims=True)


def normal(x, axis=-1):
    return (x - mean(x, axis)) / jnp.sqrt(jnp.var(x, axis, keepdims=True) + 0.1)


def grouped(x):
    return normal(x.reshape(*x.shape[:2], 3, 4), (1, 3)).reshape(x.shape)


def conv(x, w, groups=1):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def padded(x, low, high, value):
    return jnp.pad(x, ((0, 0), (0, 0), (low, high)), constant_values=value)


def scanned(a, b):
    step = lambda c, t: (jnp.cos(c + mean(t)) + 0.1 * mean(c), c * t)
    return lax.scan(step, a[:, 0], b.swapaxes(0, 1))[1].swapaxes(0, 1)


def branches(a, b):
    either = lambda a, b: jnp.cos(a) + mean(b), lambda a, b: a - b.max(-1, keepdims=True)
    return lax.cond(a.sum() > 0, *either, a, b)


# A layer has the shapes of its params, and is a function of them and of two earlier values.
LAYERS = {
    "exp": ([], lambda p, a, b: jnp.exp(jnp.tanh(a))),
    "cos": ([], lambda p, a, b: jnp.cos(a)),
    "relu": ([], lambda p, a, b: jax.nn.relu(a)),
    "add": ([], lambda p, a, b: a + b),
    "mul": ([], lambda p, a, b: a * jnp.tanh(b)),
    "where": ([], lambda p, a, b: jnp.where(a > mean(b), a, jnp.cos(b))),
    "bias": ([(SIZE,)], lambda p, a, b: a + p[0]),
    "scale": ([(SIZE,)], lambda p, a, b: a * p[0]),
    "dense": ([(SIZE, SIZE), (SIZE,)], lambda p, a, b: a @ p[0] + p[1]),
    "conv": ([(3, SIZE, SIZE)], lambda p, a, b: conv(a, p[0] - p[0].mean((0, 1)))),
    "depthwise": ([(3, 1, SIZE)], lambda p, a, b: conv(a, jnp.cos(p[0]), SIZE)),
    "softmax": ([], lambda p, a, b: jax.nn.softmax(a)),
    "layer norm": ([], lambda p, a, b: normal(a)),
    "group norm": ([], lambda p, a, b: grouped(a)),
    "largest": ([], lambda p, a, b: b + a.max(-1, keepdims=True)),
    "mean": ([], lambda p, a, b: a - mean(b, (0, 2))),
    "product": ([], lambda p, a, b: jax.nn.softmax(a @ b.swapaxes(1, 2)) @ a),
    "flatten": ([], lambda p, a, b: a + jnp.tanh(a.reshape(len(a), -1).sum(-1))[:, None, None]),
    "concatenate": ([], lambda p, a, b: jnp.concatenate([a[..., :5], b[..., 5:]], -1)),
    "split": ([], lambda p, a, b: jnp.concatenate([a[..., 6:], a[..., :6] + a[..., 6:]], -1)),
    "order": ([], lambda p, a, b: a[..., np.random.default_rng(0).permutation(SIZE)]),
    "reverse": ([], lambda p, a, b: a[..., ::-1]),
    "roll": ([], lambda p, a, b: jnp.roll(a, 5, -1)),
    "pad": ([], lambda p, a, b: padded(a, 1, 2, 0.3)[..., 1:-2] + padded(a, 1, 0, 0.5)[..., :-1]),
    "write": ([], lambda p, a, b: a.at[..., np.array([7, 2, 9])].set(jnp.cos(b[..., :3]))),
    "add to": ([], lambda p, a, b: a.at[..., 2:5].add(b[..., 4:7])),
    "accumulate": ([], lambda p, a, b: jnp.cumsum(a, 1) / 3),
    "table": ([], lambda p, a, b: (a + jnp.arange(SIZE)) * jnp.tanh(b)),
    "cond": ([], lambda p, a, b: branches(a, b)),
    "scan": ([], lambda p, a, b: scanned(a, b)),
}  # fmt: skip


def network(rng):
    """Draws a network and its params; every layer reads the last value, or any earlier one."""
    layers = [(str(rng.choice(list(LAYERS))), *rng.integers(100, size=2)) for _ in range(7)]
    shapes = [[(5, SIZE), (SIZE,)], *(LAYERS[name][0] for name, *_ in layers), [(SIZE, 3)]]
    params = [[jnp.asarray(0.4 * rng.standard_normal(s)) for s in shape] for shape in shapes]

    def fn(params, x):
        values = [x @ params[0][0] + params[0][1]]
        for (name, i, j), p in zip(layers, params[1:-1], strict=True):
            first = values[-1] if i % 2 else values[i % len(values)]
            values.append(LAYERS[name][1](p, first, values[j % len(values)]))
        last = values[-1]
        return last @ params[-1][0], values[-2].sum(-1), jax.nn.logsumexp(last, -1)

    return fn, params


def loss(fn):
    def weighted(params, x):
        outs = fn(params, x)
        weights = [jnp.sin(1.0 + jnp.arange(o.size)).reshape(o.shape) for o in outs]
        return sum(jnp.sum(w * o) for w, o in zip(weights, outs, strict=True)), outs

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def check(seed):
    """Removes half of the units of a network, and returns what it had."""
    rng = np.random.default_rng(seed)
    fn, params = network(rng)
    x = jnp.asarray(rng.standard_normal((2, 3, 5)))
    groups = jp.find_groups(fn, params, x)
    if not len(groups):
        return "no units"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one unit, none is removed
        masks = groups.select(rng.random(len(groups)), 0.5, scope="layer")
        small_fn, small, plan = jp.shrink(fn, params, masks, x, groups=groups, verify=False)
    assert plan.inexact == (), seed
    (_, expected), grads = loss(fn)(jp.apply_masks(params, masks), x)
    (_, outs), small_grads = loss(small_fn)(small, x)
    assert_close(outs, expected, 1e-9)
    assert_close(small_grads, plan.take(grads), 1e-6)
    return "shrunk" if plan.kept else "one unit"


def fuzz(cases, counts):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        for seed in range(cases):
            counts[check(seed)] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    for kind, count in sorted(fuzz(parser.parse_args().cases, collections.Counter()).items()):
        print(f"{kind:10} {count:6,}")


if __name__ == "__main__":
    main()
