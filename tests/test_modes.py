"""Scores, units, search, metrics and sweeps in the strict modes of JAX, as the user's own step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
import test_closures
import test_curves
from helpers import assert_close, normal

import jaxprune as jp

PARAMS = test_closures.PARAMS | {"bias": normal((1, 6), seed=3)}
MASKS = jax.tree.map(lambda w: w > 0, PARAMS)
GROUPS, X = test_closures.GROUPS, test_closures.X


def sweep():
    def objective(params, x):
        return jnp.mean(test_curves.apply_fn(params, x) ** 2)

    x = jnp.asarray(test_curves.X)
    train = jp.curves.trainer(objective, optax.sgd(1e-2), x, steps=1, batch_size=4)
    table = jp.curves.sweep(
        {}, [0.5], [0], train, lambda p: -objective(p, x), init=test_curves.init,
        apply_fn=test_curves.apply_fn, inputs=[x],
    )  # fmt: skip
    assert not table["error"].any(), table["error"]
    return {name: table[name] for name in ("after", "compression", "flops")}


def shrink():
    apply_fn = functools.partial(test_closures.network, scale=1.0)
    params = test_closures.PARAMS
    groups = jp.find_groups(apply_fn, params, X)
    masks = groups.select(params, 0.5, scope="layer")
    small_fn, small, plan = jp.shrink(apply_fn, params, masks, X, groups=groups)
    return small_fn(small, X), plan.put(plan.take(params))


PATTERNS = {
    "weights": jp.patterns.unstructured,
    "blocks": jp.patterns.block((2, 2)),
    "columns": jp.patterns.axis(-1),
    "1:2": jp.patterns.n_of_m(1, 2, axis=-1),
}
CALLS = {  # everything of these families: () -> result
    **{
        f"scores.{name}": lambda name=name: getattr(jp.scores, name)(PARAMS)
        for name in ("fpgm", "lamp", "magnitude", "standardized_magnitude")
    },
    "scores.random": lambda: jp.scores.random(PARAMS, test_closures.KEY),
    "scores.slimming": lambda: jp.scores.slimming(PARAMS, where=lambda path, w: path == "bias"),
    **{
        name: functools.partial(call, test_closures.closing(name, test_closures.boxed(0.3)))
        for name, call in test_closures.SCORES.items()
    },
    **{
        f"select, {scope}, {name}": lambda scope=scope, pattern=pattern: jp.select(
            PARAMS, 0.5, scope=scope, pattern=pattern
        )
        for scope in ("global", "layer", "erk")
        for name, pattern in PATTERNS.items()
    },
    "select within": lambda: jp.select(PARAMS, 0.7, within=jp.select(PARAMS, 0.5)),
    "masks": lambda: jp.masks.unpack(jp.masks.pack(jp.masks.combine(MASKS, MASKS)), PARAMS),
    "apply_masks": lambda: jp.apply_masks(PARAMS, MASKS),
    "straight_through": lambda: jp.masks.straight_through(PARAMS, MASKS),
    **{
        f"groups.select, {scope}, {cost}": lambda scope=scope, cost=cost: GROUPS.select(
            test_closures.PARAMS, 0.3, scope=scope, cost=cost, round_to=2 if cost == "units" else 1
        )
        for scope in ("global", "layer", "isomorphic")
        for cost in ("units", "params", "flops")
    },
    "shrink": shrink,
    "units.flops": lambda: jp.units.flops(GROUPS),
    "units.reduce": lambda: jp.units.reduce(
        GROUPS, jp.scores.magnitude(test_closures.PARAMS), normalize="l2"
    ),
    "metrics.sparsity": lambda: jp.metrics.sparsity(MASKS),
    "metrics.sparsity, traced": lambda: jax.jit(jp.metrics.sparsity)(MASKS),
    "metrics.stored_bytes": lambda: jp.metrics.stored_bytes(PARAMS, MASKS),
    "metrics.latency": lambda: jp.metrics.latency(
        {"a": (lambda p, x: x @ p["a"], PARAMS)}, X, rounds=1
    ).speedup("a", 3),
    "curves.sweep": sweep,
}
MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug NaNs": lambda: jax.debug_nans(True),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
}


SCRIPTS = {("transfer guard", "curves.sweep")}  # it makes keys from seeds, as a script does
PAIRS = [pair for pair in itertools.product(MODES, CALLS) if pair not in SCRIPTS]


@pytest.mark.filterwarnings("ignore:obd")
@pytest.mark.parametrize("mode, name", PAIRS)
def test_it_runs_in_every_mode(mode, name):
    expected = CALLS[name]()
    with MODES[mode]():
        found = CALLS[name]()
    assert_close(found, expected)
