"""An argument of a wrong kind is one line that names it, and never an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from test_closures import GROUPS, LOSSES, PARAMS, X, Y

import jaxprune as jp

LARGE = jnp.arange(5000.0)
SCORES = jp.scores.magnitude(PARAMS)
FUNCTION = lambda params, x: x
LOSS = lambda p, x, y: jnp.mean((x @ p["a"] @ p["c"] - y) ** 2)
BOOL = {"w": np.ones((2, 2), bool)}

WRONG = {  # a call, and what its message says
    **{
        f"{name} of scores": (lambda call=call: call(SCORES), "loss must be a function, got dict")
        for name, call in LOSSES.items()
    },
    "synflow of scores": (lambda: jp.scores.synflow(SCORES)(PARAMS, X), "must be a function"),
    "activation of scores": (
        lambda: jp.units.activation(GROUPS, SCORES),
        "apply_fn must be a function, got dict",
    ),
    "method of scores": (lambda: jp.curves.method(SCORES), "score must be a function, got dict"),
    "reduce of no groups": (lambda: jp.units.reduce(PARAMS, SCORES), "must come from .* got dict"),
    "flops of no groups": (lambda: jp.units.flops(LARGE), "must come from .*find_groups"),
    "taylor of no groups": (lambda: jp.units.taylor(LOSS, GROUPS), "groups .* got function"),
    "gates of a tuple": (lambda: jp.units.taylor_gates(GROUPS.groups, LOSS), "got tuple"),
    "activation of no groups": (lambda: jp.units.activation(PARAMS, FUNCTION), "got dict"),
    "oracle of no groups": (lambda: jp.search.oracle(PARAMS, LOSS), "got dict"),
    "groups of other params": (
        lambda: jp.units.taylor(GROUPS, LOSS)({"a": LARGE}, X, Y),
        "a: params have shape",
    ),
    "how of an array": (lambda: jp.units.reduce(GROUPS, SCORES, LARGE), "got float32"),
    "memory of an array": (
        lambda: jp.search.oracle(GROUPS, LOSS, memory=LARGE),
        "memory must be a number of bytes, .* got float32\\[5000\\]",
    ),
    "particles of an array": (
        lambda: jp.search.particle_filter(
            GROUPS, LOSS, PARAMS, 0.5, jax.random.key(0), X, Y, particles=LARGE
        ),
        "particles must be an integer of at least 1, got float32",
    ),
    "damping of an array": (
        lambda: jp.scores.woodfisher(LOSS, damping=LARGE),
        "damping must be a number above 0, got float32",
    ),
    "latency of a function": (
        lambda: jp.metrics.latency(FUNCTION, X),
        "functions: must map names to pairs .*, got function",
    ),
    "latency of functions": (
        lambda: jp.metrics.latency({"a": FUNCTION, "b": 3}, X),
        "got {'a': function, 'b': int}",
    ),
    "sparsity of numbers": (lambda: jp.metrics.sparsity({"w": LARGE}), "w: masks must be bool"),
    "sparsity of text": (lambda: jp.metrics.sparsity({"w": "all"}), "w: masks must be .* got str"),
    "sparsity of nothing": (lambda: jp.metrics.sparsity({"w": None}), "at least one mask"),
    "summary of params": (lambda: jp.metrics.summary({"w": X}, {"w": X}), "w: masks must be bool"),
    "plot of no weights": (
        lambda: jp.plot.mask(np.zeros((0, 4), bool)),
        "mask: must hold at least one weight, got shape",
    ),
    "plot of a tree": (lambda: jp.plot.mask(BOOL), "mask: must be a mask, .* got dict of 1"),
    "plot of numbers": (lambda: jp.plot.mask(LARGE), "mask: must be a mask, .* got float32"),
    "plot of no mask": (
        lambda: jp.plot.scores({"w": X}, {"w": None}),
        "masks: must hold at least one mask with weights, got none",
    ),
    "plot of empty masks": (
        lambda: jp.plot.scores({"w": np.zeros((0, 2))}, {"w": np.zeros((0, 2), bool)}),
        "masks: must hold at least one mask with weights, got none",
    ),
    "plot of scores of NaN": (
        lambda: jp.plot.scores({"w": np.full((2, 2), np.nan)}, BOOL),
        "scores: must be finite",
    ),
    "sparsity plot of nothing": (lambda: jp.plot.sparsity({"w": None}), "at least one mask"),
    "sparsity plot of numbers": (lambda: jp.plot.sparsity({"w": LARGE}), "w: must be a mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kind_is_one_line(name):
    call, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300 and "1.0, 2.0" not in text


def test_plots_leave_out_masks_without_weights():
    masks = BOOL | {"empty": np.zeros((0, 2), bool), "none": None}
    assert [t.get_text() for t in jp.plot.sparsity(masks, before=masks).get_yticklabels()] == ["w"]
    scores = {"w": np.eye(2) + 1, "empty": np.zeros((0, 2)), "none": None}
    assert jp.plot.scores(scores, masks).get_ylabel() == "weights per bin"
    jp.plot._matplotlib().pyplot.close("all")


@pytest.mark.parametrize("number", [np.float32, np.float64, jnp.float32], ids=str)
def test_numbers_need_not_be_of_python(number):
    loss = lambda p, x, y: LOSS(p, x, y)
    woodfisher = lambda damping: jp.scores.woodfisher(loss, 4, damping)(PARAMS, X, Y)
    oracle = lambda memory: jp.search.oracle(GROUPS, loss, memory=memory)(PARAMS, X, Y)
    filtered = lambda *numbers: jp.search.particle_filter(
        GROUPS, loss, PARAMS, 0.5, jax.random.key(0), X, Y,
        particles=4, rounds=1, temperature=numbers[0], mutation=numbers[1],
    ).masks  # fmt: skip
    for call, numbers in ((woodfisher, [0.125]), (oracle, [1024.0]), (filtered, [0.5, 0.25])):
        assert bits(call(*map(number, numbers))) == bits(call(*numbers))
