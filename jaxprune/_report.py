"""Reports: the results of pruning in one HTML file."""

import hashlib
import html
import io
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxprune import _atomic, _tree, plot
from jaxprune import curves as _curves
from jaxprune._plan import Plan
from jaxprune._table import Shown, Table, spell
from jaxprune.groups import Groups
from jaxprune.metrics import Layers, Summary

_INK = "#010203"  # placeholder in figures for the text colour of the page
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin: 2.5rem 0 0.75rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.75rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tfoot td, th { font-weight: 600; }
section > div { margin-bottom: 1.5rem; }
.grid { display: grid; gap: 1.5rem; grid-template-columns:
  repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; overflow: auto; } .grid svg { width: 100%; max-width: 38rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.wrap :is(td, th) { white-space: normal; overflow-wrap: anywhere; }
@media print {
  body { font-size: 11px; margin: 0; max-width: none; } table { font-size: 8px; }
  section > div, figure { max-height: none !important; overflow: visible !important; }
  .grid { grid-template-columns: 1fr 1fr; } svg { max-width: 100%; height: auto; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def report(
    path: str | os.PathLike[str],
    *,
    title: str = "Pruning report",
    summary: Summary | None = None,
    curves: _curves.Curves | None = None,
    layers: Layers | None = None,
    groups: Groups | None = None,
    plan: Plan | None = None,
    settings: Mapping[str, Any] | None = None,
    data: Any = None,
) -> pathlib.Path:
    """Writes the results of pruning into one self-contained HTML file.

    The page needs no internet connection. It also lists the versions of the packages that made it.
    Figures require matplotlib.

    Args:
      path: the file to write; it is replaced only when the report is complete.
      title: the heading.
      summary: the result of :func:`jaxprune.summary`.
      curves: the result of :func:`jaxprune.curves.sweep`.
      layers: the result of :func:`jaxprune.metrics.layers`.
      groups: the result of :func:`jaxprune.find_groups`.
      plan: the :class:`jaxprune.Plan` of :func:`jaxprune.shrink`.
      settings: names and values of the settings.
      data: a pytree of the arrays behind the figures. The report lists their shapes and hashes.

    Returns:
      The path of the file.

    Raises:
      TypeError: if an argument has the wrong type.

    Examples:
      >>> import tempfile
      >>> params, masks = {"w": jnp.ones((2, 2))}, {"w": jnp.eye(2, dtype=bool)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = jp.report(folder + "/report.html", summary=jp.summary(params, masks))
      ...     "2 of 4" in path.read_text()
      True
    """
    sections: dict[str, str] = {}
    kinds = (Summary, Layers, Groups, Plan)
    for part, kind in zip((summary, layers, groups, plan), kinds, strict=True):
        name, given = kind.__name__, type(part).__name__
        if part is not None:
            if not isinstance(part, kind):
                raise TypeError(f"report: {name.lower()} must be of type {name}, got {given}.")
            sections[name] = part._repr_html_()
    if curves is not None:
        sections = {"Curves": _curve_section(curves)} | sections
    if groups is not None:
        sections["Groups"] = _figure(plot.groups, groups) + sections["Groups"]
    facts = {"Settings": _pairs(settings or {}), "Data": _data(data)}
    facts["Versions"] = _pairs(_versions())
    sections |= {name: table._repr_html_() for name, table in facts.items() if table.rows}
    body = "".join(
        f'<section class="{"wrap" if name in facts else ""}"><h2>{name}</h2>{part}</section>'
        for name, part in sections.items()
    )
    heading = html.escape(title)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{heading}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{heading}</h1>{body}</body></html>\n"
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic.replacing(path) as new:
        new.write_text(page, encoding="utf-8")
    return path


def _curve_section(table: _curves.Curves) -> str:
    def draw(x: str) -> Any:
        axes = plot.curves(table, x)
        axes.figure.set_size_inches(4.6, 4.6)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
        axes.legend(frameon=False, fontsize="small", **below)
        return axes

    columns = ("compression", "theoretical_speedup", "measured_speedup", "stored_bytes")
    figures = "".join(_figure(draw, x) for x in columns)
    failed = [
        (str(name), f"{sparsity:.4g}", str(seed), str(error))
        for name, sparsity, seed, error in zip(
            *(table[c] for c in ("method", "sparsity", "seed", "error")), strict=True
        )
        if error
    ]
    parts: list[Shown] = [_curves.summary(table)]
    if failed:
        parts.append(Table(("failed", "sparsity", "seed", "error"), failed, left=(0, 3)))
    return f'<div class="grid">{figures}</div>' + "".join(p._repr_html_() for p in parts)


def _figure(draw: Callable[[Any], Any], data: Any) -> str:
    """Draws data as SVG, with the text colour of the page and with ids that are unique."""
    from matplotlib import pyplot, rc_context

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(names, _INK) | {"svg.fonttype": "none"}
    text = io.StringIO()
    with rc_context(settings):
        figure = draw(data).figure
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    prefix = f"i{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', prefix, svg)
    return f"<figure>{svg}</figure>"


def _pairs(facts: Mapping[str, Any]) -> Table:
    return Table(("name", "value"), [(str(k), str(v)) for k, v in facts.items()], left=(0, 1))


def _data(data: Any) -> Table:
    rows = []
    for path, leaf in _tree.named_leaves(data):
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
        rows.append((_tree.show(path), spell(array.shape), str(array.dtype), digest.hexdigest()))
    return Table(
        ("path", "shape", "dtype", "SHA-256 of dtype, shape and bytes"), rows, left=(0, 1, 2, 3)
    )


def _versions() -> dict[str, str]:
    names = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        **{name: metadata.version(name) for name in names},
        "Python": platform.python_version(),
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
    }
