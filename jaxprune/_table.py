"""Tables: text when printed, HTML in a notebook, a rich table where rich prints."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any


class Shown:
    """Base of classes that display as tables; ``_show`` returns their texts and tables."""

    def _show(self) -> "Sequence[str | Table]":
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._show()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            f'<div style="overflow: auto; max-height: 40em">{part.html()}</div>'
            if isinstance(part, Table)
            else f'<p style="white-space: pre-line">{html.escape(part)}</p>'
            for part in self._show()
        )

    def __rich__(self) -> Any:
        from rich import console, text

        return console.Group(
            *(p.rich() if isinstance(p, Table) else text.Text(p) for p in self._show())
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Table(Shown):
    """A header and rows of cells.

    Attributes:
      header: the names of the columns.
      rows: the cells, as text.
      left: the columns that are aligned left; the others are aligned right.
      total: whether the last row holds totals.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: tuple[int, ...] = (0,)
    total: bool = False

    def _show(self) -> "Sequence[Table]":
        return [self]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        head, *lines = [
            "  ".join(
                cell.ljust(w) if i in self.left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (self.header, *self.rows)
        ]
        rule = "─" * max(map(len, (head, *lines)))
        if self.total:
            lines.insert(-1, rule)
        return "\n".join([head, rule, *lines])

    def html(self) -> str:
        """Returns a ``<table>``; the page determines its style."""

        def row(cells: Sequence[str], tag: str) -> str:
            aligned = (
                f'<{tag} style="text-align: {"left" if i in self.left else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(aligned)}</tr>"

        body = [row(cells, "td") for cells in self.rows]
        foot = f"<tfoot>{body.pop()}</tfoot>" if self.total else ""
        head = row(self.header, "th")
        return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody>{foot}</table>"

    def rich(self) -> Any:
        """Returns a ``rich`` table."""
        from rich import box, table, text

        rich_table = table.Table(box=box.SIMPLE_HEAD, show_footer=self.total, pad_edge=False)
        foot = self.rows[-1] if self.total else self.header
        for i, (name, last) in enumerate(zip(self.header, foot, strict=True)):
            justify: Any = "left" if i in self.left else "right"
            rich_table.add_column(text.Text(name), text.Text(last), justify=justify)
        for cells in self.rows[: -1 if self.total else None]:
            rich_table.add_row(*map(text.Text, cells))
        return rich_table


def spell(shape: Sequence[int]) -> str:
    """Spells a shape as ``3×4``."""
    return "×".join(map(str, shape)) or "scalar"
