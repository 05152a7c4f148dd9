import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxprune import _loss, _ranks, _tree
from jaxprune._tree import Params, Where
from jaxprune.units._gates import Gates, derivatives, gates
from jaxprune.units._reduce import NORMS, normalized

if TYPE_CHECKING:
    from jaxprune.groups import Groups


def taylor(
    groups: "Groups",
    loss: Callable[..., jax.Array],
    *,
    where: Where | None = None,
    normalize: str | None = None,
) -> Callable[..., jax.Array]:
    r"""Scores a unit by how much the loss of one example would change without it, to first order.

    .. math:: s_u = \frac1N \sum_n \Big| \sum_{i \in G_u} w_i
        \frac{\partial L^{(n)}}{\partial w_i} \Big|

    The absolute value is taken per example. :func:`taylor_gates` squares the derivative of the
    entire batch, in which examples of opposite signs cancel.

    The leaves :math:`G_u` are those of the unit's gate. By default the gate covers the slice that
    produces the unit (its first member, e.g. the kernel) and the bias-shaped members after it in
    the same module (the same path up to the last part). In attention the first member is the query,
    in a recurrent cell one of its kernels. ``where`` chooses other leaves: the scale and the bias
    of a batch norm, or the slices that read the unit, such as the output projection of attention.
    All slices of a unit that ``where`` chooses form one gate.

    The paper takes the mean over positions, and this function the sum. The two differ by one factor
    per layer, which ``normalize="l2"`` divides out.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar, the mean over a batch. It is called with batches
        of one example, so a batch norm must use its running statistics.
      where: ``where(path, leaf)`` returns whether a leaf is part of the gates. A group without such
        a leaf has its default gate.
      normalize: ``"l2"`` divides the scores of each group by their norm, as the paper does to
        compare layers; also ``"mean"``, ``"max"`` and ``"sum"``.

    Returns:
      A function of ``(params, *batch)`` that returns a float32 array of shape ``(len(groups),)``.
      The first axis of every array in ``batch`` is that of the examples.

    Raises:
      ValueError: for params other than those of the groups, batch arrays of different lengths, a
        ``where`` that chooses no leaf, or an unknown ``normalize``.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> import jaxprune as jp
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> groups = jp.find_groups(apply_fn, params, x)
      >>> print(taylor(groups, lambda p, x: jnp.mean(apply_fn(p, x)))(params, x))
      [1. 3.]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016
    """
    _tree.check_word("normalize", normalize, NORMS)
    chosen = gates(groups, where)

    def score(params: Params, *batch: Any) -> jax.Array:
        _ranks.check_params(groups, params)
        _loss.check_examples("units.taylor", batch)
        params, batch = jax.tree.map(jnp.asarray, (params, batch))
        count = len(jax.tree.leaves(batch)[0])
        add = functools.partial(_add, loss, groups, chosen, params, batch)
        zeros = jnp.zeros(len(groups), jnp.float32)
        scores = _loss.fold(add, zeros, count, _tree.is_traced(params, batch)) / count
        return normalized(groups, scores, normalize)

    return score


@functools.partial(jax.jit, static_argnames=("loss", "groups", "gates"), donate_argnames="total")
def _add(
    loss: Callable[..., jax.Array],
    groups: "Groups",
    gates: Gates,
    params: Params,
    batch: Any,
    total: jax.Array,
    i: Any,
) -> jax.Array:
    example = _loss.example(batch, i)
    return total + jnp.abs(derivatives("units.taylor", loss, groups, gates, params, *example))
