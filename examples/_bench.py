"""Measures time and memory against references in plain JAX; stores and compares runs."""

import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from _common import markdown

import jaxprune as jp

NOISE = 0.2  # larger changes are marked
FORMAT = "jaxprune benchmarks 1"


class Row(NamedTuple):
    """A measurement, and that of a reference in plain JAX in the same run.

    Attributes:
      part: name of the table.
      name: the measured function.
      at: the size on the x-axis, such as the number of params.
      seconds: median time.
      plain_seconds: median time of the reference.
      ratio: median ratio of pairs timed in turn, or otherwise the ratio of the medians.
      bytes: memory.
      plain_bytes: memory of the reference.
    """

    part: str
    name: str
    at: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None
    ratio: float | None = None
    bytes: float | None = None
    plain_bytes: float | None = None

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self[:3]

    @property
    def bytes_ratio(self) -> float | None:
        return self.bytes / self.plain_bytes if self.bytes and self.plain_bytes else None


def seconds(f: Callable[[], Any]) -> float:
    """Times one call."""
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def alone(f: Callable[[], Any], repeats: int, plain_seconds: float | None = None) -> dict[str, Any]:
    """Times calls after a first one; the reference was timed before."""
    f()
    median = statistics.median(seconds(f) for _ in range(repeats))
    ratio = plain_seconds and median / plain_seconds
    return {"seconds": median, "plain_seconds": plain_seconds, "ratio": ratio}


def paired(f: Callable[[], Any], plain: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Times both in turn after a first pair, in alternating order."""
    times: dict[Any, list[float]] = {f: [], plain: []}
    for i in range(pairs + 1):
        for call in (f, plain) if i % 2 else (plain, f):
            times[call].append(seconds(call))
    ours, theirs = times[f][1:], times[plain][1:]
    return {
        "seconds": statistics.median(ours),
        "plain_seconds": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def stepping(step: Callable[..., Any], carry: Any, *args: Any) -> Callable[[], Any]:
    """Returns a call of a step whose argument is its last result, so that it may be donated."""

    def call():
        nonlocal carry
        carry = step(carry, *args)
        return carry

    return call


class Compiled(NamedTuple):
    """A program compiled ahead of time, its compile time, and the memory that XLA plans."""

    call: Callable[..., Any]
    seconds: float
    temporary: int
    output: int

    @property
    def bytes(self) -> int:
        return self.temporary + self.output


def compiled(f: Callable[..., Any], *args: Any, **options: Any) -> Compiled:
    """Compiles a function for arguments."""
    start = time.perf_counter()
    call = jax.jit(f, **options).lower(*args).compile()
    elapsed = time.perf_counter() - start
    planned = call.memory_analysis()
    return Compiled(call, elapsed, planned.temp_size_in_bytes, planned.output_size_in_bytes)


def in_new_process(f: Callable[..., list[Row]], *args: Any, devices: int = 1) -> list[Row]:
    """Calls a function in a new process, for its peak memory or for simulated devices."""
    text = f"import json, {f.__module__} as m; print(json.dumps(m.{f.__name__}(*{args!r})))"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=pathlib.Path(f.__code__.co_filename).parent,
        env=os.environ | flags,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Row(*row) for row in json.loads(done.stdout)]


def peak(f: Callable[[], Any]) -> int | None:
    """Returns by how many bytes a call raises the memory of the process, or `None` off Linux."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None

    def read(name):
        return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1]) * 1024

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read("VmRSS")
    f()
    return max(read("VmHWM") - before, 0)


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of a run."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "jaxprune": jp.__version__,
        "commit": commit,
    }


def _processor() -> str:
    model = None
    if os.path.exists("/proc/cpuinfo"):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*:\s*(.+)", text)
    return model[1] if model else platform.processor() or platform.machine()


def describe(run: Mapping[str, Any]) -> str:
    """Formats the machine and the versions of a run in one line."""
    return (
        f"{run['processor']}, {run['cores']} cores, {run['memory'] / 1e9:.0f} GB, "
        f"JAX {run['jax']} on {run['backend']}, jaxprune {run['jaxprune']} ({run['commit']}), "
        f"{run['date'][:10]}"
    )


def store(path: pathlib.Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes a run as JSON. An interrupted write leaves the old file."""
    entries = [{k: v for k, v in row._asdict().items() if v is not None} for row in rows]
    lines = ",\n  ".join(map(json.dumps, entries))
    head = json.dumps({"format": FORMAT, **machine}, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    os.replace(part, path)


def load(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """Reads a run.

    Raises:
      ValueError: if the file is not a stored run.
    """
    try:
        run = json.loads(path.read_text())
        if run.pop("format") != FORMAT:
            raise ValueError(f"the format must be {FORMAT!r}")
        rows = [Row(**row) for row in run.pop("rows")]
        describe(run)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a stored run of benchmarks.py ({type(error).__name__}: {error}). "
            "Move the file, or choose another folder with --out."
        ) from error
    return run, rows


def previous(*paths: pathlib.Path) -> dict[Any, Row]:
    """Returns the rows of the first run that exists, by key, and prints its name."""
    for path in paths:
        if path.exists():
            run, rows = load(path)
            print(f"changes are relative to {path}: {describe(run)}")
            return {row.key: row for row in rows}
    return {}


def changes(row: Row, previous: Mapping[Any, Row]) -> list[str]:
    """Formats the changes of the time ratio and of the memory ratio since a previous run."""
    before = previous.get(row.key)
    if before is None:
        return ["new", ""]
    pairs = [
        (row.ratio, before.ratio) if row.ratio else (row.seconds, before.seconds),
        (row.bytes_ratio, before.bytes_ratio) if row.bytes_ratio else (row.bytes, before.bytes),
    ]
    return [_change(now, then) for now, then in pairs]


def _change(now: float | None, then: float | None) -> str:
    if not now or not then:
        return ""
    change = now / then - 1
    return f"{change:+.0%}" + (" !" if abs(np.log(now / then)) > np.log(1 + NOISE) else "")


def table(rows: Sequence[Row], previous: Mapping[Any, Row] | None = None) -> str:
    """Formats rows as a Markdown table without empty columns, with changes since a previous run."""
    columns = ("reference", "ratio", "change")
    header = ["measured", "time", *columns, "memory", *columns]
    lines = [cells(row, previous) for row in rows]
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return markdown([header[i] for i in used], [[line[i] for i in used] for line in lines])


def cells(row: Row, previous: Mapping[Any, Row] | None = None) -> list[str]:
    """Formats the cells of a row."""
    time, memory = ("", "") if previous is None else changes(row, previous)
    return [
        row.name if row.at is None else f"{row.name}, {si(row.at)}",
        *(spell_seconds(row.seconds), spell_seconds(row.plain_seconds), three(row.ratio), time),
        *(si(row.bytes, "B"), si(row.plain_bytes, "B"), three(row.bytes_ratio), memory),
    ]


def sentences(f: Callable[..., Any]) -> str:
    """Returns the docstring of a part in one line."""
    return " ".join((f.__doc__ or "").split())


def three(x: float | None) -> str:
    """Formats three digits."""
    if x is None:
        return ""
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def si(x: float | None, unit: str = "") -> str:
    """Formats three digits and a prefix: 25M, 1.6 GB."""
    if x is None:
        return ""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{x:.3g}{' ' if unit else ''}{unit}"


def spell_seconds(x: float | None) -> str:
    """Formats three digits in s, ms or µs."""
    if x is None:
        return ""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x * 1e6:.3g} µs"


def growth(rows: Sequence[Row]) -> str:
    """Formats the exponents by which times grow, fitted to the last three points."""
    exponents = []
    for name in dict.fromkeys(row.name for row in rows):
        points = [(r.at, r.seconds) for r in rows if r.name == name and r.at and r.seconds][-3:]
        if len(points) > 1:
            exponents.append(f"{name}: n^{np.polyfit(*np.log(points).T, 1)[0]:.2f}")
    return f"\ngrowth: {'; '.join(exponents)}\n" if exponents else ""
