"""Progress bars for Python and compiled loops, shown only in terminals and notebooks."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.experimental import io_callback

_bars: dict[int, Any] = {}  # of compiled loops that run now
_numbers = itertools.count()


def seen() -> bool:
    """Returns whether bars are shown."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(items: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """Returns a ``tqdm`` bar over items, or over a ``total=``; it draws nothing where not seen."""
    from tqdm import tqdm  # not needed to import the package

    return tqdm(items, disable=not (shown and seen()), **options)


@contextlib.contextmanager
def compiled(total: int, **options: Any) -> Iterator[int]:
    """Shows a bar that :func:`advance` moves; yields its number, an argument of the program."""
    number = next(_numbers)
    with bar(total=total, **options) as _bars[number]:
        try:
            yield number
            jax.effects_barrier()
        finally:
            del _bars[number]


def advance(number: jax.Array, item: jax.Array) -> None:
    """Moves a bar by one from inside a compiled program, once for every item that is mapped."""
    # One function for all programs, so that those of one structure are equal. The debug callback of
    # JAX wraps it anew in every trace.
    io_callback(_update, None, number, item)


def _update(number: jax.Array, item: jax.Array) -> None:
    _bars[int(number)].update()
