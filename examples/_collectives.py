"""Collectives in the text of a compiled program: the arrays that devices send each other."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter"


class Array(NamedTuple):
    """An array of one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        bits = re.match(r"[a-z]+(\d*)", self.dtype)[1] or 8
        return self.size * max(int(bits), 8) // 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Collective(NamedTuple):
    """An operation, and the arrays that a device receives."""

    kind: str
    arrays: tuple[Array, ...]
    channel: int | None


def collectives(text: str) -> Iterator[Collective]:
    """Yields each collective of ``compiled.as_text()``; one in a loop is yielded once."""
    for line in text.splitlines():
        match = re.search(rf" = (.+?) ({KINDS})(-start)?\(", line)
        if match:
            types, kind, start = match.groups()
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
            if start and kind != "all-reduce":  # operands, results, and two scalars of context
                arrays = [array for array in arrays if array != ("u32", "")]
                arrays = arrays[len(arrays) // 2 :]
            shapes = [tuple(int(n) for n in sizes.split(",") if n) for _, sizes in arrays]
            channel = re.search(r"channel_id=(\d+)", line)
            yield Collective(
                kind,
                tuple(Array(d, s) for (d, _), s in zip(arrays, shapes, strict=True)),
                int(channel[1]) if channel else None,
            )
