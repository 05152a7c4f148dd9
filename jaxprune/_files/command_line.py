"""Command-line interface for checkpoint files: ``python -m jaxprune inspect|prune|diff``.

A command returns its exit code, one object for JSON, and the same numbers as tables; :func:`main`
prints one of the two.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import glob
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxprune import _progress, _select, _tree
from jaxprune._files import compact, orbax, safetensors, stream
from jaxprune._files.checkpoint import Checkpoint, FileError, Tensor, Tick, check_output
from jaxprune._table import Table, spell
from jaxprune.metrics import Row, Summary

Result = tuple[int, dict[str, Any], Any]  # exit code, object for JSON, tables


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FileError(f"{message}. See `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m jaxprune",
        description="Inspect, prune and compare checkpoint files.",
        epilog="`python -m jaxprune COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checkpoint = "a .safetensors file or an Orbax checkpoint folder"

    def command(run: Callable[[argparse.Namespace], Result], text: str) -> Callable[..., Any]:
        name = run.__name__[1:]
        parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.set_defaults(run=run)
        text = "print one JSON object instead of tables"
        parser.add_argument("--json", action="store_true", help=text)
        return parser.add_argument

    inspect = command(_inspect, "List the tensors with their shapes, zeros and bytes.")
    inspect("file", metavar="FILE", help=checkpoint)
    text = (
        "Set the weights of smallest magnitude to zero, in floating-point tensors with two or more "
        "axes. Names, dtypes, metadata and all other tensors are copied."
    )
    prune = command(_prune, text)
    prune("file", metavar="FILE", help=checkpoint)
    prune("out", metavar="OUT", help="the checkpoint to write; may be FILE")
    prune("--sparsity", type=float, metavar="S", help="the fraction of these weights to prune")
    text = "rank weights globally, per tensor, or per tensor with ERK densities (default: global)"
    prune("--scope", choices=_select.SCOPES, default="global", help=text)
    text = "keep at most N of M weights along an axis, --sparsity optional (default: unstructured)"
    prune("--pattern", type=_pattern, metavar="N:M", help=text)
    text = "the axis of N:M (default: -2, the input axis of Flax kernels; PyTorch weights need -1)"
    prune("--axis", type=int, help=text)
    text = "leave out tensors whose name matches, such as 'embed*' or 'opt_state/*'"
    prune("--exclude", nargs="+", action="extend", default=[], metavar="GLOB", help=text)
    text = (
        "List the differences between two checkpoints. The exit code is 0 if there are none, 1 if "
        "there are some, and 2 after an error."
    )
    diff = command(_diff, text)
    diff("a", metavar="A", help=checkpoint)
    diff("b", metavar="B", help="the checkpoint to compare with A")
    return parser


def _pattern(text: str) -> stream.NOfM | None:
    if text == "unstructured":
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 0 < n <= m:
        raise argparse.ArgumentTypeError(f"must be unstructured or N:M, 0 < N <= M, got {text!r}")
    return stream.NOfM(n, m)


def _bar(arguments: argparse.Namespace) -> Any:
    """Returns a progress bar over bytes; its total grows with every pass."""
    return _progress.bar(shown=not arguments.json, total=0, unit="B", unit_scale=True, leave=False)


def _opened(path: str, tick: Tick) -> contextlib.AbstractContextManager[Checkpoint]:
    return (orbax if os.path.isdir(path) else safetensors).opened(path, tick)


def _inspect(arguments: argparse.Namespace) -> Result:
    with _bar(arguments) as bar, _opened(arguments.file, bar.update) as source:
        bar.total += sum(t.bytes for t in source.tensors)
        rows: list[tuple[Any, ...]] = [
            (leaf.path, leaf.values.dtype, leaf.shape, leaf.size, _zeros(leaf), leaf.bytes)
            for leaf in compact.leaves(arguments.file, source)
        ]
        hidden = compact.INTERNAL if compact.is_compact(source) else ()
    metadata = {key: value for key, value in source.metadata.items() if key not in hidden}
    names = ("path", "dtype", "shape", "size", "zeros", "bytes")
    tensors = [dict(zip(names, row, strict=True)) for row in rows]
    total = {name: sum(t[name] or 0 for t in tensors) for name in names[3:]}
    report = {"file": arguments.file, "format": source.format, "tensors": tensors, "total": total}
    return 0, report | {"metadata": metadata}, _inspect_text(rows, total, metadata)


def _zeros(leaf: compact.Leaf) -> int | None:
    zeros = stream.zeros(leaf.values)
    return zeros if leaf.bitmap is None else leaf.size - leaf.values.size + (zeros or 0)


def _inspect_text(rows: Sequence[Any], total: dict[str, int], metadata: dict[str, Any]) -> str:
    def counts(size: int, zeros: int | None, stored: int) -> tuple[str, str, str]:
        share = "-" if zeros is None or not size else f"{zeros / size:.2%}"
        return "-" if zeros is None else f"{zeros:,}", share, f"{stored:,}"

    lines = [(_printable(p), dtype, spell(shape), *counts(*n)) for p, dtype, shape, *n in rows]
    lines.append(("total", "", f"{total['size']:,}", *counts(*total.values())))
    header = ("path", "dtype", "shape", "zeros", "sparsity", "bytes")
    tables = [Table(header, lines, left=(0, 1, 2), total=True)]
    if metadata:
        pairs = [(_printable(key), _printable(str(value))) for key, value in metadata.items()]
        tables.append(Table(("metadata", ""), pairs, left=(0, 1)))
    return "\n\n".join(map(str, tables))


def _prune(arguments: argparse.Namespace) -> Result:
    pattern, sparsity = _target(arguments)
    kept: dict[str, int] = {}
    with _bar(arguments) as bar, _opened(arguments.file, bar.update) as source:
        if compact.is_compact(source):
            raise FileError(
                f"{arguments.file}: stores only the kept weights. Prune it further with "
                "`jp.masks.load`, `jp.select(..., within=masks)` and `jp.masks.save`."
            )
        check_output(arguments.out, source.format)
        tensors = _prunable(arguments.file, source, arguments.exclude, pattern)

        def expect(size: int) -> None:
            bar.total += size

        expect(sum(t.bytes for t in source.tensors))  # the pass that writes
        thresholds = stream.thresholds(tensors, sparsity, arguments.scope, pattern, expect)

        def edit(tensor: Tensor) -> Any:
            threshold = thresholds.get(tensor.path)
            return None if threshold is None else stream.pruned(tensor, threshold, pattern, kept)

        source.save(Path(arguments.out), edit)
    rows = [
        Row(t.path, t.shape, n := math.prod(t.shape), kept.get(t.path, n), t.path in kept, t.bytes)
        for t in source.tensors
    ]
    summary = Summary(tuple(dataclasses.replace(row, path=_printable(row.path)) for row in rows))
    share = sum(kept.values()) / sum(t.size for t in tensors)
    total = {"size": summary.size, "kept": summary.kept, "sparsity": 1 - share}
    names = ("path", "shape", "size", "kept")
    entries = [{n: getattr(r, n) for n in names} | {"pruned": r.masked} for r in rows]
    report = {"file": arguments.file, "out": arguments.out, "tensors": entries, "total": total}
    return 0, report, summary


def _target(arguments: argparse.Namespace) -> tuple[stream.NOfM, float]:
    """Returns the pattern and the sparsity that were asked for."""
    pattern, axis, sparsity = arguments.pattern, arguments.axis, arguments.sparsity
    if pattern is None and axis is not None:
        raise FileError("--axis must come with a pattern. Add one, such as --pattern 2:4.")
    if pattern is None and sparsity is None:
        raise FileError("--sparsity or --pattern must be given. Add one, such as --sparsity 0.9.")
    try:
        sparsity = _select.check_sparsity(0.0 if sparsity is None else sparsity)
    except ValueError as error:
        raise FileError(str(error)) from None
    pattern = pattern or stream.NOfM(1, 1, axis=-1)
    return pattern if axis is None else pattern._replace(axis=axis), sparsity


def _prunable(
    file: str, source: Checkpoint, excludes: Sequence[str], pattern: stream.NOfM
) -> list[Tensor]:
    """Lists the tensors to prune, in the order of the leaves of a tree."""
    excluded: set[str] = set()
    for exclude in excludes:
        paths = {t.path for t in source.tensors if fnmatch.fnmatchcase(t.path, exclude)}
        if not paths:
            raise FileError(
                f"{file}: no tensor matches --exclude {exclude!r}. List the names with `inspect`."
            )
        excluded |= paths
    tensors = [t for t in source.tensors if t.prunable and t.path not in excluded]
    tensors.sort(key=lambda t: _tree.order(t.path))
    if not tensors:
        raise FileError(
            f"{file}: no floating-point tensor with two or more axes to prune. List the tensors "
            "with `inspect`."
        )
    n, m, axis = pattern
    for t in tensors:
        if not -len(t.shape) <= axis < len(t.shape) or t.shape[axis] % m:
            raise FileError(
                f"{file}: {t.path}: axis {axis} must be divisible by {m} for {n}:{m}, got shape "
                f"{t.shape}. Leave it out with --exclude {_glob(t.path)}, or choose another --axis."
            )
    return tensors


def _glob(path: str) -> str:
    """Spells a pattern for a shell that matches one name alone, and is not taken for an option."""
    pattern = glob.escape(path)
    return shlex.quote(f"[-]{pattern[1:]}" if path.startswith("-") else pattern)


def _diff(arguments: argparse.Namespace) -> Result:
    bar = _bar(arguments)
    with bar, _opened(arguments.a, bar.update) as a, _opened(arguments.b, bar.update) as b:
        before, after = ({t.path: t for t in source.tensors} for source in (a, b))
        kinds = {path: _kinds(before[path], after[path]) for path in before if path in after}
        same = [path for path, kind in kinds.items() if not kind]
        bar.total += 2 * sum(before[path].bytes for path in same)
        changes = {path: stream.changes(before[path], after[path]) for path in same}
    changes = {path: c for path, c in changes.items() if c.zeroed or c.revived or c.changed}
    numbers = ("zeroed", "revived", "changed")
    total = {name: sum(getattr(c, name) for c in changes.values()) for name in numbers}
    finite = [c.largest for c in changes.values() if not math.isnan(c.largest)]
    keys = dict.fromkeys([*a.metadata, *b.metadata]) if a.format == b.format else {}
    differences: dict[str, Any] = {
        "only_in_a": [path for path in before if path not in after],
        "only_in_b": [path for path in after if path not in before],
        "other": [{"path": path, **kind} for path, kind in kinds.items() if kind],
        "changes": [{"path": path, **c._asdict()} for path, c in changes.items()],
        "total": total | {"largest": max(finite, default=0)},
        "metadata": [key for key in keys if a.metadata.get(key) != b.metadata.get(key)],
    }
    equal = not any(differences[name] for name in differences if name != "total")
    table = _diff_table({path: before[path].shape for path in same}, differences)
    shown = f"no difference in {len(same):,} tensors" if equal else table
    return 0 if equal else 1, {"equal": equal, **differences}, shown


def _kinds(a: Tensor, b: Tensor) -> dict[str, tuple[Any, Any]]:
    pairs = {"dtype": (a.dtype, b.dtype), "shape": (a.shape, b.shape)}
    return {name: (x, y) for name, (x, y) in pairs.items() if x != y}


def _diff_table(shapes: dict[str, tuple[int, ...]], differences: dict[str, Any]) -> Table:
    def counts(zeroed: int, revived: int, changed: int, largest: float) -> tuple[str, ...]:
        return f"{zeroed:,}", f"{revived:,}", f"{changed:,}", f"{largest:.6g}"

    rows: list[tuple[str, ...]] = [(path, "only in A") for path in differences["only_in_a"]]
    rows += [(path, "only in B") for path in differences["only_in_b"]]
    for path, *pairs in (kind.values() for kind in differences["other"]):
        words = [" → ".join(x if isinstance(x, str) else spell(x) for x in pair) for pair in pairs]
        rows.append((path, ", ".join(words)))
    for path, *numbers in (change.values() for change in differences["changes"]):
        rows.append((path, spell(shapes[path]), *counts(*numbers)))
    rows += [(f"metadata {key}", "") for key in differences["metadata"]]
    rows.append(("total", "", *counts(**differences["total"])))
    header = ("path", "", "zeroed", "revived", "changed", "largest change")
    cells = [(_printable(path), *rest, *[""] * (5 - len(rest))) for path, *rest in rows]
    return Table(header, cells, left=(0, 1), total=True)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity with text, because JSON does not have them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit code."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # where a signal may be handled; exits, so that unfinished files are removed
        ends = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
        ends = [n for n in ends if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup
        before = {n: signal.signal(n, lambda number, _: sys.exit(128 + number)) for n in ends}
    try:
        arguments = _parser().parse_args(argv)
        code, report, tables = arguments.run(arguments)
        print(json.dumps(_finite(report)) if arguments.json else tables, flush=True)
        return code
    except FileError as error:
        message = str(error)
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("jaxprune: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if in_main_thread:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("jaxprune:", _printable(" ".join(message.split())), file=sys.stderr)
    return 2
