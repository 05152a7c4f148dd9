"""Masks of dead weights: connections of neurons that no signal enters or leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _program, _tree
from jaxprune._tree import Masks, Params
from jaxprune.masks import apply_masks

_SCALES = (0.1, 0.1, 1.0, 1.0, 10.0, 10.0, 100.0, 100.0, 1.0)  # of the inputs of nine networks


def remove_dead(apply_fn: Callable[..., Any], params: Params, masks: Masks, *inputs: Any) -> Masks:
    r"""Also masks dead weights: into neurons without outputs, or out of neurons without inputs.

    A weight is dead if no signal reaches it, or if no signal leads from it to an output. Then the
    derivative of the output with respect to it is zero for any values of the other weights. This is
    tested with the given network and eight random ones, in which masked weights, and zeros of
    leaves without a mask, stay zero. The test is repeated until it finds no further dead weight.

    The masked function does not change. A neuron without inputs is therefore kept if it has a
    non-zero bias or a sigmoid: it feeds a constant to the next layer. Han et al remove such a
    neuron too, and let the network recover in retraining. Biases and norms of a neuron without
    outputs are masked as well, so that :func:`jaxprune.shrink` can remove the neuron. A leaf that
    is entirely dead does not change: it may have another purpose.

    Args:
      apply_fn: the network in inference mode, ``apply_fn(params, *inputs)``.
      params: the params.
      masks: the masks; in the result, leaves that had none may have one.
      *inputs: a few examples, on which the result is checked.

    Raises:
      ValueError: for masks of other paths or shapes, or if the output would change.

    Examples:
      >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> masks = {"in": jnp.ones((2, 3), bool).at[:, 0].set(False),
      ...          "out": jnp.ones((3, 1), bool).at[1].set(False)}
      >>> masks = remove_dead(apply_fn, params, masks, jnp.ones((1, 2)))
      >>> print(masks["in"].any(0), masks["out"].ravel())
      [False False  True] [False False  True]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """
    _tree.check_params(params)
    leaves, aligned = jax.tree.leaves(params), _tree.align_masks(params, masks)
    nonzero = [w != 0 if _tree.is_floating(w) else True for w in leaves]
    changed = True
    while changed:
        present = [n if m is None else m for n, m in zip(nonzero, aligned, strict=True)]
        with jax.enable_x64(True):  # in deep networks signals vanish in float32
            args = params, _tree.rebuild(params, present), inputs
            alive = _program.freeze(functools.partial(_alive, apply_fn), *args)(*args)
        changed = False
        for i, a in enumerate(_tree.align(params, alive)):
            mask = True if aligned[i] is None else aligned[i]
            if a is not None and (mask & ~a).any() and (mask & a).any():
                aligned[i], changed = mask & a, True
    result = _tree.rebuild(params, aligned)
    run = jax.jit(lambda masks: apply_fn(apply_masks(params, masks), *inputs))
    before, after = jax.tree.leaves(run(masks)), jax.tree.leaves(run(result))
    if not all(jnp.allclose(x, y, 1e-4, 1e-6, True) for x, y in zip(before, after, strict=True)):
        raise ValueError(
            "remove_dead: apply_fn must return the same output without dead weights, got another. "
            "Pass the network in inference mode, without functions of zero derivative like `sign`."
        )
    return result


def _alive(
    apply_fn: Callable[..., Any], params: Params, present: Masks, inputs: Sequence[Any]
) -> Masks:
    """Marks the floating weights that have a derivative in at least one of nine networks.

    A weight that is not dead may still have a zero derivative in one network: behind a ReLU that is
    off, or a sigmoid that is saturated. Hence eight random networks, at four scales of the inputs:
    small inputs saturate nothing, large ones pass thresholds. All their weights are positive, and
    in every other network the inputs too, so that signals do not cancel and ReLUs are on. The ninth
    network is the given one.
    """
    treedef: Any = jax.tree.structure((params, inputs))

    def derivative(draw):
        key, given, signed, scale = draw
        *keys, last = jax.random.split(key, treedef.num_leaves + 1)
        weight_keys, input_keys = jax.tree.unflatten(treedef, keys)

        def weights(w, mask, key):
            random = jax.random.uniform(key, mask.shape, jnp.float64, 0.5, 1.5)
            # Divided by the mean number of inputs of a neuron, so that no signal outgrows the
            # others in a sum. Biases are at most as large as the inputs.
            fan = jnp.maximum(jnp.sum(mask) / mask.shape[-1], 1) if mask.ndim > 1 else 1
            size = jnp.minimum(scale, 1) if mask.ndim < 2 else 1
            return jnp.where(mask, jnp.where(given, jnp.float64(w), size * random / fan), 0)

        def examples(x, key):
            random = jax.random.normal(key, jnp.shape(x), jnp.float64)
            return jnp.where(
                given, jnp.float64(x), scale * jnp.where(signed, random, jnp.abs(random))
            )

        drawn = _tree.merge(_tree.map_floating(examples, inputs, input_keys), inputs)

        def output(floats):
            total = jnp.zeros((), jnp.float64)
            for i, y in enumerate(jax.tree.leaves(apply_fn(_tree.merge(floats, params), *drawn))):
                if _tree.is_floating(y):  # randomly weighted: the sum of a softmax is constant
                    total += jnp.sum(y * jax.random.normal(jax.random.fold_in(last, i), y.shape))
            return total

        grads = jax.grad(output)(_tree.map_floating(weights, params, present, weight_keys))
        return jax.tree.map(lambda g: ~(g == 0), grads)  # so that NaN counts as alive

    number = jnp.arange(len(_SCALES))
    keys = jax.random.split(jax.random.key(0), len(_SCALES))
    # The inputs of every other network are positive; the last network is the given one.
    draws = keys, number == len(_SCALES) - 1, number % 2 == 1, jnp.array(_SCALES)
    return jax.tree.map(lambda alive: jnp.any(alive, axis=0), jax.lax.map(derivative, draws))
