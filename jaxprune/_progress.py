"""Progress bars, where somebody sees them: of a Python loop, and of a compiled one."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

_bars: dict[int, Any] = {}  # of compiled loops that run
_numbers = itertools.count()


def seen() -> bool:
    """Says if bars are drawn: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def compiled(total: int, **options: Any) -> Iterator[int]:
    """Draws a bar that :func:`advance` moves, and gives its number to pass to the program."""
    number = next(_numbers)
    with tqdm(total=total, **options) as bar:
        _bars[number] = bar
        try:
            yield number
            jax.effects_barrier()
        finally:
            del _bars[number]


def advance(number: jax.Array, item: jax.Array) -> None:
    """Moves a bar by one, from inside of a compiled program, for every item that is mapped."""
    jax.debug.callback(lambda number, item: _bars[int(number)].update(), number, item)
