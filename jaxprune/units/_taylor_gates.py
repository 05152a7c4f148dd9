import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxprune import _loss, _program, _ranks, _tree
from jaxprune._tree import Params, Where
from jaxprune.units._taylor import choose, derivatives, gates

if TYPE_CHECKING:
    from jaxprune.groups import Groups


def taylor_gates(
    groups: "Groups", loss: Callable[..., jax.Array], *, where: Where | None = None
) -> Callable[..., jax.Array]:
    r"""Scores a unit by the squared change of the loss of a batch without it, to first order.

    .. math:: s_u = \Big( \sum_{i \in G_u} w_i \frac{\partial L}{\partial w_i} \Big)^2

    The paper puts its gates after batch norm: choose the scale and bias of batch norms with
    ``where``. To average over several batches, as the paper does, add the scores. If a unit spans
    several batch norms (along a residual stream), they form one gate, and their sum is squared.

    Args:
      groups: from ``find_groups``.
      loss: maps ``(params, *batch)`` to a scalar.
      where: ``where(path, leaf)`` returns whether a leaf is part of the gates; :func:`taylor`
        describes the default.

    Returns:
      A function of ``(params, *batch)`` that returns a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for params other than those of the groups, or a ``where`` that chooses no leaf.
      TypeError: for a loss that is not scalar.

    Examples:
      >>> params = {"in": jnp.eye(2), "out": jnp.array([[1.0], [-3.0]])}
      >>> apply_fn = lambda p, x: x @ p["in"] @ p["out"]
      >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> groups = jp.find_groups(apply_fn, params, x)
      >>> print(taylor_gates(groups, lambda p, x: jnp.mean(apply_fn(p, x)))(params, x))
      [0. 9.]

    References:
      Molchanov et al, `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019
    """
    _loss.check_groups("units.taylor_gates", groups)
    _tree.check_function("units.taylor_gates: loss", loss, _loss.CURRIED)
    chosen = choose(groups, where)

    def score(params: Params, *batch: Any) -> jax.Array:
        _ranks.check_params(groups, params)
        made = gates(groups, chosen, loss, params, batch)
        derive = functools.partial(derivatives, "units.taylor_gates", loss, groups, made)
        return _program.freeze(derive, params, *batch)(params, *batch) ** 2

    return score
