"""The command line, for who only has a file: ``python -m jaxprune inspect|prune|diff``."""

import argparse
import fnmatch
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jaxprune import _select
from jaxprune._files import compact as _compact
from jaxprune._files import safetensors as _files
from jaxprune._files import stream as _stream
from jaxprune._files.safetensors import Checkpoint, FileError, Tensor
from jaxprune._table import Table, spell
from jaxprune.metrics import Row, Summary


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FileError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m jaxprune", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    files = "a .safetensors file or an Orbax checkpoint folder"

    def command(run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            run.__name__[1:], help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object, not tables")
        return made

    made = command(_inspect, "List tensors, zeros and bytes.")
    made.add_argument("file", metavar="FILE", help=files)

    made = command(
        _prune,
        "Set the weights of smallest magnitude to zero: those of floating tensors with two or more "
        "axes. Names, dtypes, metadata and all else stay.",
    )
    made.add_argument("file", metavar="FILE", help=files)
    made.add_argument("out", metavar="OUT", help="the result; may be FILE")
    made.add_argument(
        "--sparsity", type=float, metavar="S", help="the fraction of these weights to remove"
    )
    made.add_argument(
        "--scope",
        choices=_select.SCOPES,
        default="global",
        help="compare all weights, those of a tensor, or of a tensor with densities by ERK",
    )
    made.add_argument(
        "--pattern",
        type=_pattern,
        default=None,
        metavar="N:M",
        help="keep at most N of every M weights along an axis; without --sparsity, just that "
        "(default: unstructured)",
    )
    made.add_argument(
        "--axis",
        type=int,
        help="the axis of N:M; the default -2 is the input axis of Flax kernels, files of PyTorch "
        "need -1",
    )
    made.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="leave out tensors whose name matches, such as 'embed*' or 'opt_state/*'",
    )

    made = command(
        _diff, "List what differs. Exits with 0 if nothing does, 1 if something does, 2 on errors."
    )
    made.add_argument("a", metavar="A", help=files)
    made.add_argument("b", metavar="B", help="another")
    return parser


def _pattern(text: str) -> tuple[int, int] | None:
    if text == "unstructured":
        return None
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n <= m:
        raise argparse.ArgumentTypeError(
            f"needed unstructured or N:M with 0 < N <= M, got {text!r}"
        )
    return n, m


class _Progress:
    """A bar over bytes, on a terminal."""

    def __init__(self, shown: bool):
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            import tqdm  # only where a bar is drawn

            self.bar = tqdm.tqdm(total=0, unit="B", unit_scale=True, leave=False)

    def expect(self, size: int) -> None:
        if self.bar is not None:
            self.bar.total += size

    def tick(self, size: int) -> None:
        if self.bar is not None:
            self.bar.update(size)


@contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[_Progress]:
    progress = _Progress(not arguments.json)
    try:
        yield progress
    finally:
        if progress.bar is not None:
            progress.bar.close()


def _inspect(arguments: argparse.Namespace) -> int:
    with _progress(arguments) as progress, _files.opened(arguments.file, progress.tick) as source:
        progress.expect(sum(t.bytes for t in source.tensors))
        rows = [
            (
                leaf.path,
                leaf.values.dtype,
                leaf.shape,
                math.prod(leaf.shape),
                _zeros(leaf),
                leaf.bytes,
            )
            for leaf in _compact.leaves(arguments.file, source)
        ]
        metadata = {
            k: v
            for k, v in source.metadata.items()
            if k not in _compact.INTERNAL or not _compact.is_compact(source)
        }
    size, stored = sum(row[3] for row in rows), sum(row[5] for row in rows)
    found = sum(row[4] or 0 for row in rows)
    if arguments.json:
        names = ("path", "dtype", "shape", "size", "zeros", "bytes")
        _print_json(
            file=arguments.file,
            format=source.format,
            tensors=[dict(zip(names, row, strict=True)) for row in rows],
            total={"size": size, "zeros": found, "bytes": stored},
            metadata=metadata,
        )
        return 0

    def cells(size: int, zeros: int | None, stored: int) -> tuple[str, str, str]:
        share = "-" if zeros is None or not size else f"{zeros / size:.2%}"
        return "-" if zeros is None else f"{zeros:,}", share, f"{stored:,}"

    lines = [(_printable(p), d, spell(shape), *cells(n, z, b)) for p, d, shape, n, z, b in rows]
    lines.append(("total", "", f"{size:,}", *cells(size, found, stored)))
    header = ("path", "dtype", "shape", "zeros", "sparsity", "bytes")
    print(Table(header, lines, left=(0, 1, 2), total=True))
    if metadata:
        said = [(_printable(k), _printable(str(v))) for k, v in metadata.items()]
        print()
        print(Table(("metadata", ""), said, left=(0, 1)))
    return 0


def _zeros(leaf: _compact.Leaf) -> int | None:
    zeros = _stream.zeros(leaf.values)
    return zeros if leaf.bitmap is None else math.prod(leaf.shape) - leaf.values.size + (zeros or 0)


def _prune(arguments: argparse.Namespace) -> int:
    limit, sparsity = None, arguments.sparsity
    if arguments.pattern is not None:
        n, m = arguments.pattern
        limit = _stream.Limit(n, m, -2 if arguments.axis is None else arguments.axis)
        sparsity = 0.0 if sparsity is None else sparsity
    elif arguments.axis is not None:
        raise FileError("--axis is that of a pattern, such as --pattern 2:4.")
    if sparsity is None:
        raise FileError("prune needs a fraction to remove, such as --sparsity 0.9.")
    try:
        sparsity = _select.check_sparsity(sparsity)
    except ValueError as error:
        raise FileError(str(error)) from None
    kept: dict[str, int] = {}
    with _progress(arguments) as progress, _files.opened(arguments.file, progress.tick) as source:
        if _compact.is_compact(source):
            raise FileError(
                f"{arguments.file}: holds kept weights alone. Prune further with "
                "`jp.masks.load`, `jp.select(..., within=masks)` and `jp.masks.save`."
            )
        _files.check_output(arguments.out, source.format)
        tensors = _prunable(arguments.file, source, arguments.exclude, limit)
        progress.expect(sum(t.bytes for t in source.tensors))
        try:
            cuts = _stream.select(tensors, sparsity, arguments.scope, limit, progress.expect)
        except FileError:
            raise
        except ValueError as error:
            raise FileError(f"{arguments.file}: {error}") from None

        def edit(tensor: Tensor) -> Any:
            cut = cuts.get(tensor.path)
            return None if cut is None else _stream.prune(tensor, cut, limit, kept)

        source.save(Path(arguments.out), edit)
    counts = [(t, n := math.prod(t.shape), kept.get(t.path, n)) for t in source.tensors]
    if arguments.json:
        listed = [
            {"path": t.path, "shape": t.shape, "size": n, "kept": k, "pruned": t.path in kept}
            for t, n, k in counts
        ]
        prunable = sum(t.size for t in tensors)
        total = {
            "size": sum(n for _, n, _ in counts),
            "kept": sum(k for *_, k in counts),
            "sparsity": 1 - sum(kept.values()) / prunable,
        }
        _print_json(file=arguments.file, out=arguments.out, tensors=listed, total=total)
    else:
        rows = (
            Row(_printable(t.path), t.shape, n, k, t.path in kept, t.bytes) for t, n, k in counts
        )
        print(Summary(tuple(rows)))
    return 0


def _prunable(
    file: str, source: Checkpoint, globs: Sequence[str], limit: _stream.Limit | None
) -> list[Tensor]:
    """Lists the tensors to prune, in the order of the leaves of a tree."""
    for glob in globs:
        if not any(fnmatch.fnmatchcase(t.path, glob) for t in source.tensors):
            raise FileError(f"{file}: no tensor matches --exclude {glob!r}; see `inspect`.")
    tensors = [
        t
        for t in source.ordered()
        if t.prunable and not any(fnmatch.fnmatchcase(t.path, glob) for glob in globs)
    ]
    if not tensors:
        raise FileError(
            f"{file}: no floating tensor with two or more axes to prune; see `inspect`."
        )
    if limit is not None:
        n, m, axis = limit
        for t in tensors:
            if not -len(t.shape) <= axis < len(t.shape) or t.shape[axis] % m:
                raise FileError(
                    f"{file}: {t.path}: {n}:{m} sparsity needs axis {axis} divisible by {m}, got "
                    f"shape {t.shape}. Leave it out with --exclude {t.path!r}, or name another "
                    "--axis."
                )
    return tensors


def _diff(arguments: argparse.Namespace) -> int:
    with (
        _progress(arguments) as progress,
        _files.opened(arguments.a, progress.tick) as a,
        _files.opened(arguments.b, progress.tick) as b,
    ):
        before, after = ({t.path: t for t in source.tensors} for source in (a, b))
        both = [p for p in before if p in after]
        other = {p: found for p in both if (found := _kinds(before[p], after[p]))}
        same = [p for p in both if p not in other]
        progress.expect(2 * sum(before[p].bytes for p in same))
        changes = {p: _stream.compare(before[p], after[p]) for p in same}
    changes = {p: change for p, change in changes.items() if any(change[:3])}
    only_a = [p for p in before if p not in after]
    only_b = [p for p in after if p not in before]
    metadata = []
    if a.format == b.format:
        keys = dict.fromkeys([*a.metadata, *b.metadata])
        metadata = [k for k in keys if a.metadata.get(k) != b.metadata.get(k)]
    sums = {
        w: sum(getattr(c, w) for c in changes.values()) for w in ("zeroed", "revived", "changed")
    }
    largest = max((c.largest for c in changes.values() if c.largest == c.largest), default=0)
    equal = not (changes or only_a or only_b or other or metadata)
    if arguments.json:
        _print_json(
            equal=equal,
            only_in_a=only_a,
            only_in_b=only_b,
            other=[{"path": p, **found} for p, found in other.items()],
            changes=[{"path": p, **c._asdict()} for p, c in changes.items()],
            total={**sums, "largest": largest},
            metadata=metadata,
        )
    elif equal:
        print(f"no difference in {len(same):,} tensors")
    else:
        rows: list[tuple[str, ...]] = [(p, "only in A", "", "", "", "") for p in only_a]
        rows += [(p, "only in B", "", "", "", "") for p in only_b]
        for path, found in other.items():
            words = [" → ".join(x if w == "dtype" else spell(x) for x in found[w]) for w in found]
            rows.append((path, ", ".join(words), "", "", "", ""))
        for path, c in changes.items():
            counts = f"{c.zeroed:,}", f"{c.revived:,}", f"{c.changed:,}"
            rows.append((path, spell(before[path].shape), *counts, f"{c.largest:.6g}"))
        rows += [(f"metadata {key}", "", "", "", "", "") for key in metadata]
        rows.append(("total", "", *(f"{n:,}" for n in sums.values()), f"{largest:.6g}"))
        header = ("path", "", "zeroed", "revived", "changed", "largest change")
        rows = [(_printable(path), *rest) for path, *rest in rows]
        print(Table(header, rows, left=(0, 1), total=True))
    return 0 if equal else 1


def _kinds(a: Tensor, b: Tensor) -> dict[str, tuple[Any, Any]]:
    pairs = {"dtype": (a.dtype, b.dtype), "shape": (a.shape, b.shape)}
    return {word: (x, y) for word, (x, y) in pairs.items() if x != y}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _print_json(**found: Any) -> None:
    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: valid(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [valid(v) for v in value]
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else str(value)  # JSON has no NaN

    print(json.dumps(valid(found)))


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # so that what is unfinished is removed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and gives its exit code."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if main_thread else None
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except FileError as error:
        message = str(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("jaxprune: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
    print("jaxprune:", _printable(" ".join(message.split())), file=sys.stderr)
    return 2
