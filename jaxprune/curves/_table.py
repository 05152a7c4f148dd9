"""The table of a sweep: stored in a file, loaded, averaged over seeds."""

import contextlib
import csv
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxprune import _atomic
from jaxprune._table import Table
from jaxprune.curves._settings import differing

Curves = Mapping[str, np.ndarray]  # columns of equal length, one entry for each point
Row = dict[str, Any]
Key = tuple[str, float, int]  # method, sparsity, seed

DENSE = "dense"
"""The method of the rows that hold the unpruned control."""
_RATIOS = ("compression", "theoretical_speedup", "measured_speedup")
_SIZES = ("stored_bytes", "params", "flops")
MEASURES = dict.fromkeys(("before", "after", *_RATIOS, *_SIZES, "trainings", "seconds"), float)
"""The columns that hold numbers, and their types."""
COLUMNS = {"method": str, "sparsity": float, "seed": int} | MEASURES
COLUMNS |= {"error": str, "settings": str}


def finished(store: str | os.PathLike[str] | None, settings: Mapping[str, str]) -> dict[Key, Row]:
    """Reads the points of a store that did not fail, by method, sparsity and seed.

    Raises a `ValueError` that names a setting in which a point differs from that of its method, or
    from that without a method, whose name is ``""``.
    """
    rows = {} if store is None else _stored(store)
    rows = {key: row for key, row in rows.items() if not row["error"]}
    for (name, sparsity, seed), row in rows.items():
        if others := differing(row["settings"], settings.get(name, settings[""])):
            raise ValueError(
                f"{store}: points must have the settings of this sweep, got another "
                f"{', '.join(others)} for {str(name)!r} at sparsity {sparsity:.4g}, seed {seed}. "
                "Use another file."
            )
    return rows


def add(row: Row, store: str | os.PathLike[str]) -> None:
    """Adds a point to those that this and other processes have stored."""
    with _locked(_path(store).parent):
        rows = _stored(store)
        rows[row["method"], row["sparsity"], row["seed"]] = row
        save(tabulate(rows.values()), store)


def _stored(store: str | os.PathLike[str]) -> dict[Key, Row]:
    path = _path(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(load(path)) if path.exists() else []
    return {(r["method"], r["sparsity"], r["seed"]): r for r in rows}


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time write to a folder; one that is killed lets the next one in."""
    try:
        import fcntl
    except ImportError:  # Windows: one process alone may use a store
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _rows(table: Curves) -> list[Row]:
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def tabulate(rows: Iterable[Row]) -> Curves:
    """Makes columns of rows; a missing number is NaN."""
    rows = list(rows)
    kinds = COLUMNS.items()
    return {name: np.array([row.get(name, np.nan) for row in rows], kind) for name, kind in kinds}


def save(table: Curves, path: str | os.PathLike[str]) -> None:
    """Writes a table to a ``.csv`` or ``.json`` file, which is replaced only when complete.

    Examples:
      >>> import tempfile
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in COLUMNS.items()}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(table, folder + "/points.csv")
    """
    path = _path(path)
    columns = {name: table[name].tolist() for name in COLUMNS}
    text = io.StringIO()
    if path.suffix == ".csv":
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    else:
        # JSON has no NaN, which marks the numbers of failed points.
        finite = {k: [None if x != x else x for x in cells] for k, cells in columns.items()}
        json.dump({"jaxprune": "curves", "columns": finite}, text, indent=1)
    with _atomic.replacing(path) as new:
        new.write_text(text.getvalue(), encoding="utf-8", newline="")


def load(path: str | os.PathLike[str]) -> Curves:
    """Reads a table that was written by :func:`save` or :func:`sweep`.

    Raises:
      ValueError: for a truncated file, or one that is not a table of curves.

    Examples:
      >>> import tempfile
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in COLUMNS.items()}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(table, folder + "/points.json")
      ...     load(folder + "/points.json")["seed"].tolist()
      [0, 0]
    """
    path = _path(path)
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".csv":
            header, *lines = csv.reader(io.StringIO(text, newline=""))
            columns: dict[str, Any] = dict(zip(header, zip(*lines, strict=True), strict=True))
        else:
            columns = json.loads(text)["columns"]
        count = len(columns["method"])
        columns = {"settings": [""] * count, **columns}  # which earlier tables do not have
        if len(sizes := {len(columns[name]) for name in COLUMNS}) != 1:
            raise ValueError(f"columns of {sorted(sizes)} entries")
        return {
            name: np.array([np.nan if cell is None else kind(cell) for cell in columns[name]], kind)
            for name, kind in COLUMNS.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: must be a table with the columns {', '.join(COLUMNS)}, as "
            f"`jp.curves.save` writes it, got a truncated or another file ({error})."
        ) from error


def _path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: suffix must be .csv or .json, got {path.suffix!r}.")
    return path


def over_seeds(table: Curves) -> Curves:
    """Averages over seeds: the mean and standard deviation for every method and sparsity.

    Returns:
      A dict of arrays: ``method``, ``sparsity``, ``seeds`` (the number of points that did not
      fail), and for every measure its mean under its own name and its sample standard deviation
      under the name with suffix ``_std`` (0 for one seed). The measure ``change`` is ``after``
      minus that of the dense network with the same seed.

    Examples:
      >>> table = {name: np.zeros(2).astype(kind) for name, kind in COLUMNS.items()}
      >>> table |= {"error": np.array(["", ""]), "after": np.array([0.7, 0.9])}
      >>> over_seeds(table)["after"].round(3).tolist(), over_seeds(table)["seeds"].tolist()
      ([0.8], [2])
    """
    dense, ok = table["method"] == DENSE, table["error"] == ""
    control = dict(zip(table["seed"][dense], table["after"][dense], strict=True))
    baseline = np.array([control.get(seed, np.nan) for seed in table["seed"]])
    table = {**table, "change": table["after"] - baseline}
    columns: dict[str, list[Any]] = {"method": [], "sparsity": [], "seeds": []}
    pairs = zip(table["method"].tolist(), table["sparsity"].tolist(), strict=True)
    for name, sparsity in dict.fromkeys(pairs):  # each pair once, in the order of the table
        points = ok & (table["method"] == name) & (table["sparsity"] == sparsity)
        count = int(points.sum())
        row = {"method": name, "sparsity": sparsity, "seeds": count}
        for measure in (*MEASURES, "change"):
            sample = table[measure][points]
            row[measure] = sample.mean() if count else np.nan
            row[f"{measure}_std"] = sample.std(ddof=1) if count > 1 else 0.0 if count else np.nan
        for column, value in row.items():
            columns.setdefault(column, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def summary(table: Curves) -> Table:
    """Tabulates the quality (mean ± standard deviation over seeds) and the savings of each point.

    Examples:
      >>> table = {name: np.ones(2).astype(kind) for name, kind in COLUMNS.items()}
      >>> table |= {"method": np.array(["dense", "SNIP"]), "error": np.array(["", ""])}
      >>> [row[0] for row in summary(table).rows]
      ['dense', 'SNIP']
    """
    rows = []
    for row in _rows(over_seeds(table)):
        point = str(row["method"]), f"{row['sparsity']:.4g}", str(row["seeds"])
        if not row["seeds"]:
            rows.append((*point, *[""] * 6, "failed"))
            continue
        before, after = (
            f"{row[q]:.4g}" + (f" ± {row[q + '_std']:.2g}" if row["seeds"] > 1 else "")
            for q in ("before", "after")
        )
        ratios = [f"{row[ratio]:.2f}×" for ratio in _RATIOS]
        change, stored = f"{row['change']:+.2g}", f"{row['stored_bytes']:,.0f}"
        rows.append((*point, before, after, change, *ratios, stored))
    header = ("method", "sparsity", "seeds", "before", "after", "change", "compression")
    return Table((*header, "FLOPs", "time", "bytes"), rows)
