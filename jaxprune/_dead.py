"""Masks of dead weights: connections of neurons that no signal enters or leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune._tree import Masks, Params
from jaxprune.masks import apply_masks

_SCALES = (0.1, 1.0, 10.0, 100.0)  # of the random inputs


def remove_dead(apply_fn: Callable[..., Any], params: Params, masks: Masks, *inputs: Any) -> Masks:
    r"""Also masks dead weights: into neurons without outputs, or out of neurons without inputs.

    A weight is dead if no signal reaches it, or if no signal leads from it to an output. Then the
    derivative of the output with respect to it is zero for any values of the other weights. This is
    tested with the given network and eight random ones, in which masked weights, and zeros of
    leaves without a mask, stay zero. The test is repeated until it finds no further dead weight.

    The masked function does not change. A neuron without inputs is therefore kept if it has a
    non-zero bias or a sigmoid: it feeds a constant to the next layer. Han et al remove such a
    neuron too, and let the network recover in retraining.

    Biases and norms of a neuron without outputs are masked as well, so that
    :func:`jaxprune.shrink` can remove the neuron. A leaf that is entirely dead does not change: it
    may have another purpose.

    Args:
      apply_fn: the network in inference mode, ``apply_fn(params, *inputs)``.
      params: the params.
      masks: the masks.
      *inputs: a few examples, on which the result is checked.

    Returns:
      Masks. Some leaves that had no mask may have one.

    Raises:
      ValueError: for masks of other paths or shapes, or if the output would change.

    Examples:
      >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> masks = {"in": jnp.ones((2, 3), bool).at[:, 0].set(False),
      ...          "out": jnp.ones((3, 1), bool).at[1].set(False)}
      >>> masks = remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))
      >>> print(masks["in"].astype(int), masks["out"].astype(int).ravel())
      [[0 0 1]
       [0 0 1]] [0 0 1]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    _tree.check_params(params)
    leaves, aligned = jax.tree.leaves(params), _tree.align_masks(params, masks)
    changed = True
    while changed:
        present = [_present(w, m) for w, m in zip(leaves, aligned, strict=True)]
        with jax.enable_x64(True):  # in deep networks signals vanish in float32
            alive = _alive(apply_fn, params, present, inputs)
        changed = False
        for i, (connected, a) in enumerate(zip(present, alive, strict=True)):
            mask = jnp.ones_like(connected) if aligned[i] is None else aligned[i]
            if (mask & ~a).any() and (mask & a).any():
                aligned[i], changed = mask & a, True
    result = _tree.rebuild(params, aligned)
    run = jax.jit(lambda masks: apply_fn(apply_masks(params, masks), *inputs))
    before, after = jax.tree.leaves(run(masks)), jax.tree.leaves(run(result))
    if not all(jnp.allclose(x, y, 1e-4, 1e-6, True) for x, y in zip(before, after, strict=True)):
        raise ValueError(
            "remove_dead: apply_fn must return the same output without dead weights, got another "
            "one. Pass the network in inference mode, without functions such as `sign`, whose "
            "derivative is zero."
        )
    return result


def _present(leaf: Any, mask: jax.Array | None) -> jax.Array:
    """Marks the weights of a leaf that take part: where the mask is true, or where it is not 0."""
    if mask is not None:
        return mask
    floating = _tree.is_floating(leaf)
    return jnp.asarray(leaf != 0) if floating else jnp.ones(jnp.shape(leaf), bool)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _alive(
    apply_fn: Callable[..., Any],
    params: Params,
    present: Sequence[jax.Array],
    inputs: Sequence[Any],
) -> list[jax.Array]:
    """Marks the weights that have a derivative in at least one of nine networks.

    A weight that is not dead may still have a zero derivative in one network: behind a ReLU that is
    off, or a sigmoid that is saturated. Hence eight random networks, at four scales of the inputs:
    small inputs saturate nothing, large ones pass thresholds. All their weights are positive, and
    in every other network the inputs too, so that signals do not cancel and ReLUs are on. The ninth
    network is the given one.
    """
    leaves, (data, treedef) = jax.tree.leaves(params), jax.tree.flatten(inputs)
    floating = [i for i, w in enumerate(leaves) if _tree.is_floating(w)]

    def derivative(draw):
        key, given, signed, scale = draw
        keys = jax.random.split(key, len(leaves) + len(data) + 1)
        weights: list[Any] = [None] * len(leaves)
        for i in floating:
            mask = present[i]
            random = jax.random.uniform(keys[i], mask.shape, jnp.float64, 0.5, 1.5)
            # Divided by the mean number of inputs of a neuron, so that no signal outgrows the
            # others in a sum. Biases are at most as large as the inputs.
            fan = jnp.maximum(jnp.sum(mask) / mask.shape[-1], 1) if mask.ndim > 1 else 1
            size = jnp.minimum(scale, 1) if mask.ndim < 2 else 1
            weights[i] = jnp.where(mask, jnp.where(given, leaves[i], size * random / fan), 0)
        drawn = list(data)
        for i, x in enumerate(data):
            if _tree.is_floating(x):
                random = jax.random.normal(keys[len(leaves) + i], jnp.shape(x), jnp.float64)
                random = scale * jnp.where(signed, random, jnp.abs(random))
                drawn[i] = jnp.where(given, x, random)

        def output(weights):
            outputs = apply_fn(_tree.merge(weights, params), *jax.tree.unflatten(treedef, drawn))
            total = jnp.zeros((), jnp.float64)
            for i, y in enumerate(jax.tree.leaves(outputs)):
                if _tree.is_floating(y):  # randomly weighted: the sum of a softmax is constant
                    factors = jax.random.normal(jax.random.fold_in(keys[-1], i), y.shape)
                    total += jnp.sum(y * factors)
            return total

        grads = jax.tree.leaves(jax.grad(output)(_tree.rebuild(params, weights)))
        return [~(g == 0) for g in grads]  # so that NaN counts as alive

    signed, count = jnp.array([False, True]), 2 * len(_SCALES) + 1
    draws = (
        jax.random.split(jax.random.key(0), count),
        jnp.arange(count) == count - 1,  # the last one: the given network
        jnp.append(jnp.tile(signed, len(_SCALES)), False),
        jnp.append(jnp.repeat(jnp.array(_SCALES), 2), 1.0),
    )
    alive = [jnp.ones_like(mask) for mask in present]
    for i, nonzero in zip(floating, jax.lax.map(derivative, draws), strict=True):
        alive[i] = jnp.any(nonzero, axis=0)
    return alive
