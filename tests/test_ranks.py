import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import _ranks
from jaxprune.groups import Group


class Units(types.SimpleNamespace):
    """What the order reads of groups."""

    def __len__(self):
        return sum(len(group.units) for group in self.groups)


def network(rng):
    """Groups of random sizes, whose units are numbered in random order."""
    sizes = rng.integers(1, 9, size=rng.integers(1, 6))
    numbers = np.split(rng.permutation(sizes.sum()) + 1, np.cumsum(sizes)[:-1])
    groups = tuple(Group(np.sort(n), (("w", 0, int(rng.integers(1, 4))),)) for n in numbers)

    return Units(groups=groups)


def by_hand(groups, scores, pools, within, round_to, fractions):
    """Removes units one by one, the lowest score of a pool first, never the best of a group."""
    kept = np.ones(len(groups), bool)
    scored = [g for g in range(len(pools)) if (scores[groups.groups[g].units - 1] < np.inf).any()]
    scores = np.where(within, scores, -np.inf)
    for pool in set(pools[scored]):
        units = [groups.groups[g].units - 1 for g in scored if pools[g] == pool]
        best = {unit[np.argmax(scores[unit])] for unit in units}
        worst = sorted(set(np.concatenate(units)) - best, key=lambda u: scores[u])
        count = np.round(fractions[pool] * (len(worst) + len(best)))
        kept[worst[: int(count)]] = False
    for group in groups.groups:
        units, step = group.units - 1, round_to // np.gcd(round_to, group.members[0][2])
        count, size = kept[units].sum(), len(units)
        if count < size and step <= size:
            count = int(np.clip(np.round(count / step), 1, size // step) * step)
        elif count < size:  # smaller than a step: it keeps all
            count = size
        kept[units] = False
        kept[units[np.argsort(-scores[units])[:count]]] = True
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_order_by_hand(seed):
    rng = np.random.default_rng(seed)
    groups = network(rng)
    count = len(groups.groups)
    pools = [np.zeros(count, int), np.arange(count), np.arange(count) % 2][seed % 3]
    scores = rng.permutation(len(groups)).astype("f4")
    if count > 1:
        scores[groups.groups[-1].units - 1] = np.inf
    within = np.ones(len(groups), bool)
    within[rng.integers(len(groups))] = seed % 2  # one at most is no longer there
    round_to = int(rng.integers(1, 5))
    fractions = rng.uniform(0, 1, pools.max() + 1).round(1)

    def kept(scores, within, fractions):
        order = _ranks.order(groups, scores, pools, within, round_to)
        return _ranks.kept(order, fractions)

    expected = by_hand(groups, scores, pools, within, round_to, fractions)
    result = kept(jnp.asarray(scores), jnp.asarray(within), fractions)
    np.testing.assert_array_equal(result, expected)
    traced = jax.jit(lambda scores, within: kept(scores, within, fractions))(scores, within)
    np.testing.assert_array_equal(traced, expected)


def test_nan_is_removed_first():
    groups = Units(groups=(Group(np.arange(1, 5), (("w", 0, 1),)),))
    order = _ranks.order(groups, jnp.array([1.0, jnp.nan, 2.0, 3.0]), np.zeros(1, int), None, 1)
    assert np.asarray(_ranks.kept(order, jnp.array([0.25]))).tolist() == [True, False, True, True]
