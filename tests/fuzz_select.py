"""Fuzzes selection and masks: ``python tests/fuzz_select.py --cases 10000``.

Most cases select, with any scope, pattern and earlier masks, from random trees of all floating
dtypes, with ties, zeros, subnormals, NaN and infinities. The others apply and enforce masks where
weights and gradients are random bits. NumPy checks the results.
"""

import argparse
import collections
import functools
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # names its types to NumPy
import numpy as np
import optax
import pytest
from fuzz_files import seeds, settings

import jaxprune as jp
from jaxprune import _tree

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
SHAPES = [(), (0, 3), (1, 1), (7,), (8,), (4, 6), (5, 7), (8, 16), (2, 4, 8), (3, 3, 2, 4)]
PATTERNS = {
    "unstructured": jp.patterns.unstructured,
    "2:4": jp.patterns.n_of_m(2, 4, -1, pad=True),
    "n:4": jp.patterns.n_of_m(None, 4, -1, pad=True),
    "block": jp.patterns.block((3,)),
    "axis": jp.patterns.axis(-1),
}


@functools.cache
def structure(number):
    """Returns a tree of one to four shapes, and `None`."""
    rng = np.random.default_rng(number)
    first, *rest = (
        jax.ShapeDtypeStruct(SHAPES[rng.integers(len(SHAPES))], np.dtype(rng.choice(DTYPES)))
        for _ in range(rng.integers(1, 5))
    )
    return [first, {"a": None, "b": rest[1:]}, tuple(rest[:1])] if number % 3 else {"w": first}


@st.composite
def scored(draw, structures):
    """Draws scores, some of them not finite."""
    kind, rng = draw(st.sampled_from(["normal", "tie", "equal", "any size", "odd"])), np.random
    rng = rng.default_rng(draw(seeds))

    def leaf(s):
        array = rng.normal(size=s.shape)
        if kind == "tie":
            array = np.sign(array) * rng.integers(0, 2, s.shape)
        elif kind == "equal":
            array = np.full(s.shape, rng.choice([0.0, -0.0, 1.0]))
        elif kind == "any size":
            array = array * np.exp2(rng.integers(-149, 120, s.shape))
        most = float(jnp.finfo(s.dtype).max)
        array = np.clip(array, -most, most)
        if kind == "odd":
            array = np.where(rng.random(s.shape) < 0.1, rng.choice([np.nan, np.inf]), array)
        return np.asarray(array, s.dtype)

    return jax.tree.map(leaf, draw(structures))


def random_masks(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.random(np.shape(w)) < 0.7, tree)


def check_select(scores, sparsity, scope, name, within):
    """Checks errors, counts, order, cells and nesting of a selection; returns the kind of case."""
    pattern = PATTERNS[name]

    def select(scores, sparsity=sparsity):
        return jp.select(
            scores, sparsity, scope=scope, pattern=pattern, within=within,
            where=lambda path, w: w.ndim > 0,
        )  # fmt: skip

    def pooled(arrays):
        return {p: np.asarray(pattern.pool(jnp.asarray(a, jnp.float32))) for p, a in arrays.items()}

    read = {p: np.asarray(w, np.float32) for p, w in _tree.named_leaves(scores) if w.ndim > 0}
    if not read:
        with pytest.raises(ValueError, match="^select found no leaf to prune"):
            select(scores)
        return "nothing to prune"
    before = {p: np.ones(s.shape, bool) for p, s in read.items()}
    before |= {p: m for p, m in _tree.named_leaves(within) if p in read}
    compete = {p: u != 0 for p, u in pooled(before).items()}
    cells = pooled(read)
    odd = [p for p, u in cells.items() if (~np.isfinite(u) & compete[p]).any()]
    if odd:
        with pytest.raises(ValueError) as error:
            select(scores)
        assert str(error.value).split(": ")[0] in odd
        select = jax.jit(select)  # there NaN is lowest
        cells = {p: np.where(np.isnan(u), -np.inf, u) for p, u in cells.items()}
    masks = {p: np.asarray(m) for p, m in _tree.named_leaves(select(scores))}
    assert masks.keys() == read.keys()
    assert all(m.dtype == bool and m.shape == read[p].shape for p, m in masks.items())
    assert all((m <= before[p]).all() for p, m in masks.items())
    kept = pooled(masks)
    if within is None:
        assert all(np.isin(u, [0, 1]).all() for u in kept.values())  # none is kept in part
    for group in [list(read)] if scope == "global" else [[p] for p in read]:
        if name in ("2:4", "n:4"):
            n = sum(kept[p].size for p in group)
            assert sum(int(kept[p].sum()) for p in group) <= n - round(sparsity * n)
        elif all(read[p].size for p in group):
            check_cells(*([x[p].ravel() for p in group] for x in (cells, compete, kept)), sparsity)
    if name == "2:4":
        for m in masks.values():
            padded = np.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, -m.shape[-1] % 4)])
            assert (padded.reshape(-1, 4).sum(1) <= 2).all()
    if name != "n:4" and not odd:  # another sparsity takes more of the same
        more = dict(_tree.named_leaves(select(scores, (1 + sparsity) / 2)))
        assert all((np.asarray(more[p]) <= m).all() for p, m in masks.items())
    return name + ", not finite" * bool(odd)


def check_cells(scores, compete, kept, sparsity):
    """Checks that the largest competing cells are kept, and how many."""
    scores, compete, kept = map(np.concatenate, (scores, compete, kept))
    kept = kept > 0
    assert kept.sum() == min(kept.size - round(sparsity * kept.size), compete.sum())
    here, lost = scores[kept], scores[compete & ~kept]
    assert not here.size or not lost.size or here.min() >= lost.max()


TX = optax.chain(optax.clip(1.0), optax.sgd(0.1))


def check_masks(shapes, seed):
    """Applies, enforces and packs random masks: pruned is zero, kept is as it was."""
    rng = np.random.default_rng(seed)

    def leaf(s):
        bits = rng.integers(0, 256, [int(np.prod(s.shape)), s.dtype.itemsize], np.uint8)
        return jnp.asarray(bits.view(s.dtype).reshape(s.shape))

    params, grads = jax.tree.map(leaf, shapes), jax.tree.map(leaf, shapes)
    masks = random_masks(seed, shapes)
    masked = jp.apply_masks(params, masks)
    for w, v, m in zip(*map(jax.tree.leaves, (params, masked, masks)), strict=True):
        assert v.dtype == w.dtype
        np.testing.assert_array_equal(*(np.asarray(x, np.float32)[m] for x in (v, w)))
        assert not np.asarray(v, np.float32)[~m].any()
    tx = jp.enforce(TX, masks)
    after = optax.apply_updates(masked, tx.update(grads, tx.init(masked), masked)[0])
    for v, m in zip(jax.tree.leaves(after), jax.tree.leaves(masks), strict=True):
        assert not np.asarray(v, np.float32)[~m].any()
    unpacked = jp.masks.unpack(jp.masks.pack(masks), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == b).all(), unpacked, masks))
    return "masks"


def fuzz(cases, counts):
    """Runs four cases in five on `select`, a few hundred for each structure, which is compiled."""
    structures = st.integers(0, cases // 250).map(structure)

    @settings(cases - cases // 5)
    @hypothesis.given(
        scored(structures), st.floats(0, 0.999), st.sampled_from(["global", "layer"]),
        st.sampled_from(list(PATTERNS)), st.none() | seeds,
    )  # fmt: skip
    def selections(scores, sparsity, scope, name, seed):
        within = None if seed is None else random_masks(seed, scores)
        counts[check_select(scores, sparsity, scope, name, within)] += 1

    @settings(cases // 5)
    @hypothesis.given(structures, seeds)
    def masks(shapes, seed):
        counts[check_masks(shapes, seed)] += 1

    selections()
    masks()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    counts, start = collections.Counter(), time.perf_counter()
    fuzz(parser.parse_args().cases, counts)
    for kind, count in sorted(counts.items()):
        print(f"{kind:26} {count:8,}")
    print(f"{counts.total():,} cases in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
