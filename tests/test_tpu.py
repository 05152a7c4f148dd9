"""On a TPU pod, compiled but not run: a pruning fits the memory of a chip, and sends scalars."""

import collections
import importlib.util
import json
import pathlib

import pytest
from helpers import python

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "tpu_pod.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the compiler for TPUs, is missing: pip install 'jax[tpu]'",
    ),
]
MODELS = {"7B": (6_738_415_616, 16), "70B": (68_976_648_192, 256)}  # params of Llama 2, chips


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Compiles every program once, in a process of its own: libtpu takes over signals and logs."""
    file = tmp_path_factory.mktemp("tpu") / "found.json"
    python(
        *(EXAMPLE, "--models", *MODELS, "--json", file),
        JAX_OPTIMIZATION_LEVEL="O0",  # half the time, the same sent
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        JAX_ENABLE_COMPILATION_CACHE="0",
    )
    return {(row["model"], row["program"]): row for row in json.loads(file.read_text())}


def memory(row):
    return row["arguments"] + row["outputs"] + row["temporary"]


def sent(row, name):
    return collections.Counter({(kind, arrays): n for kind, arrays, n in row[name]})


def assert_few_sums(scalars):
    """All are sums of scalars in one loop; XLA splits and mixes them as it likes."""
    assert {kind for kind, _ in scalars} == {"all-reduce"}
    assert scalars.total() <= 16


@pytest.mark.parametrize("program", ["select", "SynFlow", "Adam", "gradual"])
@pytest.mark.parametrize("model", MODELS)
def test_fits_a_chip(model, program, found):
    row = found[model, program]
    assert (row["params"], row["chips"]) == MODELS[model]
    adam = 2 if program in ("Adam", "gradual") else 0
    whole = 4 * (1 + adam) * row["params"] / row["chips"] / 2**30
    assert row["arguments"] > 0.99 * whole  # all are there, less the norms that `select` leaves out
    assert memory(row) < 15.75  # what a v5e leaves to programs


@pytest.mark.parametrize("model", MODELS)
def test_gradual_takes_the_memory_of_one_select(model, found):
    select = found[model, "select"]
    more = memory(found[model, "gradual"]) - memory(found[model, "Adam"])
    assert 0 < more < select["outputs"] + select["temporary"]


@pytest.mark.parametrize("model", MODELS)
def test_select_sends_scalars(model, found):
    row = found[model, "select"]
    assert not row["arrays"]
    assert_few_sums(sent(row, "scalars"))


@pytest.mark.parametrize("model", MODELS)
def test_gradual_sends_what_adam_sends_and_scalars(model, found):
    adam, gradual = found[model, "Adam"], found[model, "gradual"]
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in sent(adam, "arrays")}
    assert sent(gradual, "arrays") == sent(adam, "arrays")
    assert sent(adam, "scalars") <= sent(gradual, "scalars")
    assert_few_sums(sent(gradual, "scalars") - sent(adam, "scalars"))
