import functools
import html
import io
import re

import jax
import jax.numpy as jnp
import pytest
import rich.console

import jaxprune as jp
from jaxprune._table import Table

PARAMS = {"a [0, 1) <b>": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
X = jnp.ones((4, 3))


def network(params, x):
    return jax.nn.relu(x @ params["a [0, 1) <b>"]) @ params["out"]


@functools.cache
def groups():
    return jp.find_groups(network, PARAMS, X)


@functools.cache
def masks():
    return groups().select(jp.scores.magnitude(PARAMS), 0.5)


TABULAR = {  # a class that shows as a table adds one row here
    "summary": lambda: jp.summary(PARAMS, masks()),
    "masks": lambda: jp.summary(masks()),
    "layers": lambda: jp.metrics.layers(network, PARAMS, X),
    "latency": lambda: jp.metrics.latency({"dense <b>": (network, PARAMS)}, X, rounds=2),
    "groups": groups,
    "plan": lambda: jp.shrink(network, PARAMS, masks(), X)[2],
}


@pytest.mark.parametrize("name", TABULAR)
def test_shows_the_same_everywhere(name):
    shown = TABULAR[name]()
    assert repr(shown) == str(shown)
    cells = re.findall(r"[^\s─]+", str(shown))
    page = re.sub("<[^>]*>", " ", shown._repr_html_())
    assert sorted(html.unescape(page).split()) == sorted(cells)
    assert "<b>" not in shown._repr_html_()
    text = io.StringIO()
    rich.console.Console(file=text, width=300).print(shown)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    assert sorted(re.findall(r"[^\s─]+", printed)) == sorted(cells)


def test_table_aligns():
    table = Table(("name", "n"), [("a", "1"), ("bcdefg", "22"), ("total", "23")], total=True)
    assert str(table).splitlines() == [
        "name     n",
        "──────────",
        "a        1",
        "bcdefg  22",
        "──────────",
        "total   23",
    ]
