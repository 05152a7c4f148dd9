"""Pruning inside your own jitted train step: with Flax NNX, a Linen TrainState and bare JAX.

Each of the three steps scores the weights anew every --every steps under `jax.lax.cond`, to a
sparsity that grows with the step, and carries the masks in what its loop carries anyway. Two
ways are shown for each:

- enforce: pruned weights are held at zero by `jp.enforce`; `jp.set_masks` swaps the masks.
- straight-through: `jp.masks.straight_through` in the loss prunes in the forward pass only, so
  that weights go on learning, and come back when they have grown large by the next scoring. The
  masks are applied for good at the end.

    python examples/custom_train_step.py --steps 600
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import load
from flax import linen, nnx
from flax.training import train_state

import jaxprune as jp

WIDTHS = (64, 128, 64, 10)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def rescore(args, step, params, masks, within):
    """Every n steps, new masks from the magnitudes; else, and in the last 2/5 of steps, the old."""
    begin, end = args.steps // 5, args.steps * 3 // 5
    schedule = jp.schedules.cubic(args.sparsity, begin, end)
    due = (step == end) | ((step < end) & (step % args.every == 0))

    def prune():
        scores = jp.scores.magnitude(params)
        return jp.select(scores, schedule(step), within=masks if within else None)

    return jax.lax.cond(due, prune, lambda: masks)


def all_kept(params):
    return jp.select(jp.scores.magnitude(params), 0.0)


# Flax NNX: the masks live in the optimizer's state, which nnx.jit carries.


class Network(nnx.Module):
    def __init__(self, rngs):
        pairs = zip(WIDTHS, WIDTHS[1:], strict=False)
        self.layers = nnx.List(nnx.Linear(n, m, rngs=rngs) for n, m in pairs)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def train_nnx(args, data, straight):
    graph, params = nnx.split(Network(nnx.Rngs(args.seed)), nnx.Param)
    tx = optax.adam(1e-3) if straight else jp.enforce(optax.adam(1e-3), all_kept(params))
    model = nnx.merge(graph, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(params, masks, x, y):
        if straight:
            params = jp.masks.straight_through(params, masks)
        return cross_entropy(nnx.merge(graph, params)(x), y)

    @nnx.jit
    def step(model, optimizer, masks, i, x, y):
        params = nnx.state(model, nnx.Param)
        masks = rescore(args, i, params, masks, within=not straight)
        if not straight:
            state = jp.set_masks(nnx.as_pure(optimizer.opt_state), masks)
            nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.update(model, jax.grad(loss)(params, masks, x, y))
        return masks

    masks = all_kept(params)
    for i, (x, y) in enumerate(data(args.steps)):
        masks = step(model, optimizer, masks, i, x, y)
    params = nnx.state(model, nnx.Param)
    if straight:
        params = jp.apply_masks(params, masks)
    return lambda params, x: nnx.merge(graph, params)(x), params, masks


# Flax Linen: the masks are one more field of the TrainState.


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        for width in WIDTHS[1:-1]:
            x = linen.relu(linen.Dense(width)(x))
        return linen.Dense(WIDTHS[-1])(x)


class PrunedState(train_state.TrainState):
    masks: dict


def train_linen(args, data, straight):
    model = LinenNetwork()
    params = model.init(jax.random.key(args.seed), jnp.zeros((1, WIDTHS[0])))["params"]
    masks = all_kept(params)
    tx = optax.adam(1e-3) if straight else jp.enforce(optax.adam(1e-3), masks)
    state = PrunedState.create(apply_fn=model.apply, params=params, tx=tx, masks=masks)

    def loss(params, masks, x, y):
        if straight:
            params = jp.masks.straight_through(params, masks)
        return cross_entropy(model.apply({"params": params}, x), y)

    @jax.jit
    def step(state, x, y):
        masks = rescore(args, state.step, state.params, state.masks, within=not straight)
        state = state.replace(masks=masks)
        if not straight:
            state = state.replace(opt_state=jp.set_masks(state.opt_state, masks))
        return state.apply_gradients(grads=jax.grad(loss)(state.params, masks, x, y))

    for x, y in data(args.steps):
        state = step(state, x, y)
    params = jp.apply_masks(state.params, state.masks) if straight else state.params
    return lambda params, x: model.apply({"params": params}, x), params, state.masks


# Bare JAX: a dict of arrays, and all steps in one jitted scan.


def apply_dict(params, x):
    for layer in list(params.values())[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    last = list(params.values())[-1]
    return x @ last["kernel"] + last["bias"]


def init_dict(seed):
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    init = jax.nn.initializers.lecun_normal()
    return {
        f"layer{i}": {"kernel": init(k, (n, m)), "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, WIDTHS, WIDTHS[1:], strict=False))
    }


def train_dict(args, data, straight):
    params = init_dict(args.seed)
    masks = all_kept(params)
    tx = optax.adam(1e-3) if straight else jp.enforce(optax.adam(1e-3), masks)

    def loss(params, masks, x, y):
        if straight:
            params = jp.masks.straight_through(params, masks)
        return cross_entropy(apply_dict(params, x), y)

    def step(carry, batch):
        params, state, masks = carry
        i, (x, y) = batch
        masks = rescore(args, i, params, masks, within=not straight)
        if not straight:
            state = jp.set_masks(state, masks)
        updates, state = tx.update(jax.grad(loss)(params, masks, x, y), state, params)
        return (optax.apply_updates(params, updates), state, masks), None

    x, y = zip(*data(args.steps), strict=True)
    batches = jnp.arange(args.steps), (jnp.stack(x), jnp.stack(y))
    train = jax.jit(functools.partial(jax.lax.scan, step))
    (params, _, masks), _ = train((params, tx.init(params), masks), batches)
    return apply_dict, jp.apply_masks(params, masks) if straight else params, masks


def assert_pruned_are_zero(params, masks):
    """Compares by `jp.apply_masks`, which would change any pruned weight that is not zero."""
    changed = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), params, jp.apply_masks(params, masks)
    )
    assert not any(jax.tree.leaves(changed)), changed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between scorings")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    x_train, y_train, x_test, y_test = load()

    def data(steps):
        for index in np.random.default_rng(args.seed).integers(len(x_train), size=(steps, 64)):
            yield x_train[index], y_train[index]

    print(f"{'':<12}{'':<18}{'loss':>8}{'accuracy':>10}{'sparsity':>10}")
    for name, train in [("NNX", train_nnx), ("Linen", train_linen), ("bare JAX", train_dict)]:
        for straight in (False, True):
            apply, params, masks = train(args, data, straight)
            assert_pruned_are_zero(params, masks)
            logits = apply(params, x_test)
            loss, right = cross_entropy(logits, y_test), jnp.mean(logits.argmax(-1) == y_test)
            way = "straight-through" if straight else "enforce"
            sparsity = jp.metrics.sparsity(masks)
            print(f"{name:<12}{way:<18}{loss:8.3f}{right:10.1%}{sparsity:10.1%}")


if __name__ == "__main__":
    main()
