import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _mesh, _program, _ranks, _tree
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
    from the traced program, so layers need not return them. Heads are read where their outputs are
    projected. Values inside a scan, a while loop or a cond are not seen.

    Args:
      groups: from ``find_groups``.
      apply_fn: the function for which the groups were found.
      statistic: ``"mean"``, ``"std"`` or ``"mean_l2"``.

    Returns:
      A function of ``(params, *inputs)`` that returns a float32 array of shape ``(len(groups),)``.

    Raises:
      ValueError: for an unknown statistic, groups of another function, or units that no activation
        carries.

    Examples:
      >>> import jaxprune as jp
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
      <https://arxiv.org/abs/2407.14679>`_, 2024 (mean over the sequence, norm over the batch; there
      with norms of head outputs)
    """
    _tree.check_word("statistic", statistic, ("mean", "std", "mean_l2"))

    def score(params: Params, *inputs: Any) -> jax.Array:
        _ranks.check_params(groups, params)
        return _activation(apply_fn, groups, statistic, params, *inputs)

    return score


class _Read(NamedTuple):
    """An activation, one of its axes, and the unit of each index along that axis, 0 for none."""

    array: jax.Array
    axis: int
    unit: np.ndarray


@functools.partial(jax.jit, static_argnames=("apply_fn", "groups", "statistic"))
def _activation(
    apply_fn: Callable[..., Any], groups: "Groups", statistic: str, params: Params, *inputs: Any
) -> jax.Array:
    score = jnp.zeros(len(groups), jnp.float32)
    for array, axis, unit in _reads(groups, apply_fn, params, inputs):
        numbers, place = np.unique(unit, return_inverse=True)
        values = _mesh.automatic(functools.partial(_statistic, statistic, axis, place), array)
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


def _reads(
    groups: "Groups", apply_fn: Callable[..., Any], params: Params, inputs: Sequence[Any]
) -> list[_Read]:
    """Evaluates the program, and lists activations such that one of them carries each unit."""
    structure = _program.analyse(apply_fn, params, inputs, **groups.options)
    units = [groups.unit[path] for path, _ in _tree.named_leaves(params)]
    unit = structure.spread(units)
    pairs = [
        pair
        for leaf, axes in zip(structure.leaves, units, strict=True)
        for pair in zip(leaf.axes, axes, strict=True)
    ]
    if not all(np.array_equal(unit[axis], numbers) for axis, numbers in pairs):
        raise ValueError(
            "groups: must be those of this function, got units that it unites or pins. Find them "
            "with the same function and params; the batch size may differ."
        )
    flat = _program.Flat()
    args = jax.tree.leaves((params, inputs))
    ins = [flat.add(v, x) for v, x in zip(structure.program.ins, args, strict=True)]
    flat.run(structure.program, ins)

    reads: list[_Read] = []
    first_sum = np.full(len(groups) + 1, -1)  # for each unit, the first read that is summed over it
    last = np.full(len(groups) + 1, -1)  # for each unit, the last read that carries it
    for i, axis, summed in _candidates(flat, len(structure.leaves), len(args)):
        array, along = flat.arrays[i], unit[flat.values[i].axes[axis]]
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        carried = np.unique(along[along > 0])
        if summed:
            first_sum[carried[first_sum[carried] < 0]] = len(reads)
        else:
            last[carried] = len(reads)
        reads.append(_Read(array, axis, along))
    chosen = np.where(first_sum < 0, last, first_sum)
    for group in groups.groups:
        if (chosen[group.units] < 0).any():
            raise ValueError(
                f"{_tree.show(group.members[0][0])}: the units of its group must be in an "
                "activation outside of loops and branches, got none. Score them by their params, "
                "or unroll the loop."
            )
    # Of each activation, only the units that are read from it.
    reads = [r._replace(unit=r.unit * (chosen[r.unit] == i)) for i, r in enumerate(reads)]
    return [read for read in reads if read.unit.any()]


def _candidates(flat: Any, params: int, args: int) -> list[tuple[int, int, bool]]:
    """Lists ``(value, axis, whether an equation sums products over it)`` in order of evaluation.

    Only values that depend on an input are activations.
    """
    fed = set(range(params, args))
    candidates = []
    for eqn, ins, outs in flat.steps:
        candidates += [(i, axis, True) for i, axis in _summed(eqn, ins) if i in fed]
        if fed.intersection(ins):
            fed.update(outs)
            candidates += [(i, n, False) for i in outs for n in range(len(flat.values[i].axes))]
    return candidates


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
