"""Fingerprints of functions and data, to tell whether two runs have the same settings.

A function is known by all that it reads: its code, defaults, closure and globals, and functions in
these in turn, down to the learning rate in the closure of an optimizer and the arrays of the data.
Code of libraries counts, but not their globals. Objects of other types than containers, namespaces,
dataclasses and arrays cannot be read, and count by their type alone. A list that grows is another
one, since it might hold data.
"""

import argparse
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import _mesh


def fingerprint(*values: Any) -> str:
    """Returns eight hexadecimal digits that depend on all that can be read of some values."""
    digest = hashlib.sha256()
    _read(digest.update, values, {})
    return digest.hexdigest()[:8]


def _read(add: Callable[[bytes], None], x: Any, seen: dict[int, Any]) -> None:
    kind = type(x)
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return add(f"{kind.__name__} {x!r};".encode())
    if not isinstance(x, tuple | types.CodeType):  # of which Python shares equal ones, or not
        if id(x) in seen:
            return add(f"number {list(seen).index(id(x))};".encode())
        seen[id(x)] = x  # alive, so that its id remains its own
    add(f"{kind.__module__}.{kind.__qualname__};".encode())
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        add(f"{x.dtype} {x.shape};".encode())
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)  # type: ignore[arg-type]
        if not isinstance(x, jax.ShapeDtypeStruct):
            add(_mesh.read(x).tobytes())
    elif isinstance(x, types.ModuleType | type):
        add(f"{x.__name__};".encode())
    else:
        for part in _parts(x):
            _read(add, part, seen)


def _parts(x: Any) -> Iterator[Any]:
    """Yields what can be read of an object; its type is read already."""
    if isinstance(x, types.FunctionType):
        yield x.__code__
        yield from (x.__defaults__, x.__kwdefaults__)
        yield from (cell.cell_contents for cell in x.__closure__ or ())
        if not _is_of_library(x):
            yield from (x.__globals__[n] for n in _names(x.__code__) if n in x.__globals__)
    elif isinstance(x, types.CodeType):
        yield from (x.co_code, x.co_names, x.co_consts)
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, types.MethodType):
        yield from (x.__func__, x.__self__)
    elif hasattr(x, "__wrapped__"):  # a jitted or cached function
        yield x.__wrapped__
    elif isinstance(x, tuple | list):
        yield from x
    elif isinstance(x, set | frozenset):
        yield sorted(map(fingerprint, x))
    elif isinstance(x, Mapping):
        yield from x.items()
    elif isinstance(x, argparse.Namespace | types.SimpleNamespace):
        yield vars(x)
    elif dataclasses.is_dataclass(x):
        yield from ((f.name, getattr(x, f.name, None)) for f in dataclasses.fields(x))


def _names(code: types.CodeType) -> list[str]:
    """Lists the global names that a function and the functions inside it may read."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return [*code.co_names, *(name for c in inner for name in _names(c))]


def _is_of_library(fn: types.FunctionType) -> bool:
    package = (fn.__module__ or "").split(".")[0]
    installed = "site-packages" in fn.__code__.co_filename
    return installed or package == __name__.split(".")[0] or package in sys.stdlib_module_names
