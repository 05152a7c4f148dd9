"""Fingerprints: values that differ have others, in every process."""

import dataclasses
import functools
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import python

from jaxprune._fingerprint import fingerprint


@dataclasses.dataclass
class Config:
    rate: float
    act: object = jnp.tanh


class Opaque:
    def __init__(self, rate):
        self.rate = rate


READ = {  # (number) -> a value that differs with it
    "number": lambda n: n,
    "type": lambda n: 1 if n == 1 else 1.0,
    "array": lambda n: np.full(3, n),
    "dtype": lambda n: np.ones(3, "f4" if n == 1 else "i4"),
    "shape alone": lambda n: jax.ShapeDtypeStruct((n,), "float32"),
    "key": lambda n: jax.random.key(n),
    "nested": lambda n: {"a": [(1, {n})]},
    "closure": lambda n: lambda: n,
    "function in a closure": lambda n: (lambda f: lambda: f())(lambda: n),
    "default": lambda n: lambda x=n: x,
    "keyword default": lambda n: lambda *, x=n: x,
    "code": lambda n: (lambda x: x + 1) if n == 1 else (lambda x: x + 2),
    "jit": lambda n: jax.jit(lambda: n),
    "partial": lambda n: functools.partial(jnp.add, n),
    "method": lambda n: Config(n).__eq__,
    "dataclass": lambda n: Config(0.1, lambda: n),
    "namespace": lambda n: types.SimpleNamespace(steps=n),
    "optimizer": lambda n: optax.chain(optax.clip(1.0), optax.adam(optax.constant_schedule(n))),
    "linen module": lambda n: nn.Sequential([nn.Dense(n), nn.relu]).apply,
    "cached": lambda n: functools.lru_cache(lambda: n),
    "recursive": lambda n: endless(n),
}


def endless(n):
    return lambda: (n, endless)


@pytest.mark.parametrize("name", READ)
def test_fingerprints_differ_where_values_do(name):
    made = READ[name]
    assert fingerprint(made(1)) == fingerprint(made(1))
    assert fingerprint(made(1)) != fingerprint(made(2))
    assert fingerprint(Opaque(1)) == fingerprint(Opaque(2))  # cannot be read


def test_fingerprints_are_those_of_another_process():
    code = """
import sys; sys.path.append({folder!r})
import test_fingerprint as t
print([t.fingerprint(made(1)) for made in t.READ.values()])
"""
    code = code.format(folder=str(pathlib.Path(__file__).parent))
    printed = {python("-c", code, PYTHONHASHSEED=seed).strip() for seed in "12"}
    assert printed == {str([fingerprint(made(1)) for made in READ.values()])}
