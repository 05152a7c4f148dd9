import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _loss, _mesh, _program, _ranks, _tree
from jaxprune._tree import Params

if TYPE_CHECKING:
    from jaxprune.groups import Groups


def activation(
    groups: "Groups", apply_fn: Callable[..., Any], statistic: str = "mean"
) -> Callable[..., jax.Array]:
    r"""Scores a unit by a statistic of its activations, without a gradient.

    With :math:`a` the entries of the unit in the operand of the first matmul or convolution that
    sums over the unit, over all examples and positions:

    - ``"mean"``: :math:`s_u = \operatorname{mean} |a|`
    - ``"std"``: the standard deviation of :math:`a`
    - ``"mean_l2"``: :math:`s_u = \sqrt{\sum_n (\operatorname{mean} |a^{(n)}|)^2}`, the mean of
      each example, then the norm over examples (the first axis of :math:`a`)

    If nothing sums over the unit, :math:`a` is the last value that carries it. Activations are read
    from the traced program, so layers need not return them; heads where their outputs are
    projected. Values inside a scan, a while loop or a cond are not seen.

    Args:
      groups: from ``find_groups``.
      apply_fn: the function for which the groups were found.
      statistic: ``"mean"``, ``"std"`` or ``"mean_l2"``.

    Returns:
      A function of ``(params, *inputs)`` that returns a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for an unknown statistic, groups of another function, or units in no activation.

    Examples:
      >>> params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.ones((2, 1))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
      >>> x = jnp.array([[1.0], [-1.0], [3.0], [1.0]])
      >>> groups = jp.find_groups(apply_fn, params, x)
      >>> print(activation(groups, apply_fn)(params, x))
      [1.25 0.5 ]

    References:
      Molchanov et al, `Pruning Convolutional Neural Networks for Resource Efficient Inference
      <https://arxiv.org/abs/1611.06440>`_, 2016 (mean and standard deviation)

      Muralidharan et al, `Compact Language Models via Pruning and Knowledge Distillation
      <https://arxiv.org/abs/2407.14679>`_, 2024 (``mean_l2``; there with norms of head outputs)
    """
    _loss.check_groups("units.activation", groups)
    _tree.check_function("units.activation: apply_fn", apply_fn, _loss.CURRIED)
    _tree.check_word("statistic", statistic, ("mean", "std", "mean_l2"))

    def score(params: Params, *inputs: Any) -> jax.Array:
        _ranks.check_params(groups, params)
        measure = functools.partial(_activation, apply_fn, groups, statistic)
        return _program.freeze(measure, params, *inputs)(params, *inputs)

    return score


def _activation(
    apply_fn: Callable[..., Any], groups: "Groups", statistic: str, params: Params, *inputs: Any
) -> jax.Array:
    flat, _, units, separate = evaluate(groups, apply_fn, params, inputs, **groups.options)
    if not separate.all():
        raise ValueError(
            "groups: must be those of this function, got units that it unites or pins. Find them "
            "with the same function and params; the batch size may differ."
        )
    count = len(jax.tree.leaves(params))
    activations = _activations(flat, range(count, count + len(jax.tree.leaves(inputs))))
    chosen = np.full(len(groups) + 1, -1)  # for each unit, the activation from which it is read
    for number, (i, axis) in enumerate(activations):
        chosen[units[i][axis]] = number
    for group in groups.groups:
        if (chosen[group.units] < 0).any():
            raise ValueError(
                f"{_tree.show(group.members[0][0])}: the units of its group must be in an "
                "activation outside of loops and branches, got none. Score them by their params, "
                "or unroll the loop."
            )
    score = jnp.zeros(len(groups), jnp.float32)
    for number in np.unique(chosen[1:]):
        i, axis = activations[number]
        unit = units[i][axis]
        numbers, place = np.unique(unit * (chosen[unit] == number), return_inverse=True)
        measure = functools.partial(_statistic, statistic, axis, place)
        values = _mesh.automatic(measure, flat.arrays[i])
        score = score.at[numbers[numbers > 0] - 1].set(values[numbers > 0])
    return score


def _statistic(statistic: str, axis: int, place: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns one number for all entries of an array at the same place along an axis."""
    entries = np.bincount(place).astype(np.float32)[None]

    def mean(a: jax.Array) -> jax.Array:  # of each example and place
        sums = jnp.zeros((len(a), entries.size), jnp.float32)
        return sums.at[:, place].add(jnp.mean(a, 1)) / entries

    a = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    a = a.reshape(len(a) if a.ndim > 1 else 1, -1, a.shape[-1])  # example, position, index
    if statistic == "mean":
        return jnp.mean(mean(jnp.abs(a)), 0)
    if statistic == "std":
        centre = jnp.mean(mean(a), 0)[place]
        return jnp.sqrt(jnp.mean(mean((a - centre[None, None]) ** 2), 0))
    return jnp.linalg.norm(mean(jnp.abs(a)), axis=0)


def evaluate(
    groups: "Groups", apply_fn: Callable[..., Any], params: Params, inputs: Any, **options: Any
) -> tuple[Any, list[int], list[tuple[np.ndarray, ...]], np.ndarray]:
    """Evaluates a function, and finds the units in its values.

    Returns:
      The evaluated program; the numbers of its results; for each value and axis, the unit of each
      index, 0 for none; for each unit, whether the function keeps it separate, as the groups do.
    """
    with jax.transfer_guard_host_to_device("allow"):  # of numbers that the walk computes with
        structure = _program.analyse(apply_fn, params, inputs, **options)
    leaves = [groups.unit[path] for path, _ in _tree.named_leaves(params)]
    unit = structure.spread(leaves)
    separate = np.ones(len(groups) + 1, bool)
    for leaf, axes in zip(structure.leaves, leaves, strict=True):
        for axis, numbers in zip(leaf.axes, axes, strict=True):
            differ = unit[axis] != numbers
            separate[unit[axis[differ]]] = separate[numbers[differ]] = False
    flat = _program.Flat()
    args = jax.tree.leaves((params, inputs))
    ins = [flat.add(v, x) for v, x in zip(structure.program.ins, args, strict=True)]
    outs = flat.run(structure.program, ins)
    values = [tuple(unit[axis] for axis in v.axes) for v in flat.values[len(leaves) :]]
    return flat, outs, leaves + values, separate


def _activations(flat: Any, inputs: Iterable[int]) -> list[tuple[int, int]]:
    """Lists floating values that depend on inputs, with their axes.

    A unit is read from the last of them that carries it: from the first that is summed over it, as
    those come last and in reverse, or else from the last value.
    """
    fed = set(inputs)
    carried, summed = [], []
    for eqn, ins, outs in flat.steps:
        summed += [(i, axis) for i, axis in _summed(eqn, ins) if i in fed]
        if fed.intersection(ins):
            fed.update(outs)
            carried += [(i, axis) for i in outs for axis in range(len(flat.values[i].axes))]
    activations = carried + summed[::-1]
    return [(i, n) for i, n in activations if jnp.issubdtype(flat.arrays[i].dtype, jnp.floating)]


def _summed(eqn: Any, ins: Sequence[int]) -> list[tuple[int, int]]:
    """Lists the operands over whose axes an equation sums products, with the axes."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        pairs = zip(ins, params["dimension_numbers"][0], strict=True)
        return [(i, axis) for i, axes in pairs for axis in axes]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        depthwise = eqn.invars[1].aval.shape[numbers.rhs_spec[1]] == 1
        return [] if depthwise else [(ins[0], numbers.lhs_spec[1])]
    return []
