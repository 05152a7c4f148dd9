import json
import os
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
from files import check, run, sparse_model, weights, write

import jaxprune as jp
from jaxprune._files import stream
from jaxprune._files.command_line import main

W = np.ones((4, 4), np.float32)


def test_inspect_prints_a_table(tmp_path, capsys):
    tensors = {"w": np.array([[0, 1, 2], [0, 3, 0]], np.float16), "n\x1b[1m\n": np.ones(3, "int8")}
    file = write(tmp_path / "in", tensors, {"a": "b"})
    assert run(capsys, "inspect", file) == (
        0,
        """path        dtype    shape  zeros  sparsity  bytes
──────────────────────────────────────────────────
w           float16  2×3        3    50.00%     12
n\\x1b[1m\\n  int8     3          0     0.00%      3
──────────────────────────────────────────────────
total                9          3    33.33%     15

metadata
───────────
a         b
""",
        "",
    )


def test_prune_reports_kept_weights(tmp_path, capsys):
    file = write(tmp_path / "in", weights())
    argv = "prune", file, tmp_path / "out", "--sparsity", 0.5, "--exclude", "z/*", "b*"
    code, out, err = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    pruned = {t["path"]: t["kept"] for t in found["tensors"] if t["pruned"]}
    assert pruned == {"conv": 144} and found["total"]["sparsity"] == 0.5
    _, out, _ = run(capsys, *argv)
    assert "conv      3×3×8×4  144 of 288    50.00%" in out


def test_inspect_lists_the_leaves_of_a_sparse_model(tmp_path, capsys):
    path = str(tmp_path / "file")
    jp.masks.save(path, *sparse_model())
    assert main(["inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["path"]: row for row in found["tensors"]}
    row = rows["dense/kernel"]
    assert row["shape"] == [24, 10] and row["size"] - row["zeros"] == 21
    assert row["bytes"] == 21 * 4 + 30 and rows["dense/bias"]["zeros"] == 10
    assert found["metadata"].keys() == {"format", "version", "checksum"}
    assert main(["inspect", path]) == 0 and "24×10" in capsys.readouterr().out
    assert main(["prune", path, path, "--sparsity", "0.5"]) == 2
    assert "stores only the kept weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "required: COMMAND"),
        ("frobnicate", "invalid choice"),
        ("inspect", "required: FILE"),
        ("inspect missing", "missing: No such file"),
        ("inspect /dev/null", "not a regular file"),
        ("inspect .", "not an Orbax checkpoint"),
        ("inspect in --what", "unrecognized arguments: --what"),
        ("diff in missing", "missing: No such file"),
        ("prune in out", "--sparsity 0.9"),
        ("prune in out --sparsity 1.0", "[0, 1), got 1.0"),
        ("prune in out --sparsity nan", "got nan"),
        ("prune in out --sparsity x", "invalid float"),
        ("prune in out --spars 0.5", "unrecognized arguments"),
        ("prune in out --sparsity 0.5 --scope rows", "invalid choice: 'rows'"),
        ("prune in out --pattern 4:2", "must be unstructured or N:M"),
        ("prune in out --pattern 0:2", "must be unstructured or N:M"),
        ("prune in out --pattern 2:5", "z/kernel: axis -2 must be divisible by 5"),
        ("prune in out --pattern 2:4 --axis 2", "--exclude"),
        ("prune in out --sparsity 0.5 --axis -1", "--pattern 2:4"),
        ("prune in out --sparsity 0.5 --exclude nope*", "no tensor matches --exclude 'nope*'"),
        ("prune in out --sparsity 0.5 --exclude *", "no floating-point tensor"),
        ("prune in no/folder/out --sparsity 0.5", "does not exist"),
        ("prune in . --sparsity 0.5", "is not a regular file"),
        ("prune in /dev/null --sparsity 0.5", "is not a regular file"),
        ("prune nan out --sparsity 0.5", "nan: w: weights must be finite in float32"),
        ("prune inf out --pattern 1:2", "inf: w: weights must be finite in float32"),
        ("prune far out --sparsity 0", "far: w: weights must be finite in float32"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", {"z/kernel": np.ones((6, 4), np.float32), "b": np.ones(3)})
    write(tmp_path / "nan", {"w": np.array([[1, np.nan]], np.float16)})
    write(tmp_path / "inf", {"w": np.array([[1], [-np.inf]], np.float32)})
    write(tmp_path / "far", {"w": np.array([[1, 1e300]])})
    names = set(os.listdir())
    code, out, err = run(capsys, *argv.split())
    assert (code, out) == (2, "") and words in err
    assert err.startswith("jaxprune: ") and err.count("\n") == 1
    assert set(os.listdir()) == names


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left")]
)
def test_an_interrupted_write_leaves_the_old_file(tmp_path, capsys, monkeypatch, error):
    file, out = write(tmp_path / "in", weights()), tmp_path / "out"
    out.write_bytes(b"old")
    pruned, calls = stream.pruned, []

    def fail(*arguments):
        calls.append(os.listdir(tmp_path))
        if len(calls) == 2:
            raise error
        yield from pruned(*arguments)

    monkeypatch.setattr(stream, "pruned", fail)
    try:
        code = main(["prune", file, str(out), "--sparsity", "0.5"])
    except SystemExit as exit:
        code = exit.code
    assert code in (2, 130, 143) and len(calls[1]) == 3
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert capsys.readouterr().err.count("\n") == (code != 143)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_unfinished_files(tmp_path, monkeypatch, number):
    file = write(tmp_path / "in", weights())
    monkeypatch.setattr(stream, "pruned", lambda *a: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(128 + number)):
        main(["prune", file, file, "--sparsity", "0.5"])
    assert os.listdir(tmp_path) == ["in"] and signal.getsignal(number) is before
    check(file, weights())


def test_a_terminal_that_closes_does_not_end_what_nohup_started(tmp_path, capsys, monkeypatch):
    file, pruned = write(tmp_path / "in", weights()), stream.pruned
    monkeypatch.setattr(
        stream, "pruned", lambda *a: os.kill(os.getpid(), signal.SIGHUP) or pruned(*a)
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(capsys, "prune", file, file, "--sparsity", 0.5)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["odd[1]", "a*b?", "-x", "two words", "it's", "a/b"])
def test_suggested_patterns_match(tmp_path, capsys, name):
    tensors = {name: np.ones((5, 4), np.float32), "odd1": np.ones((4, 4), np.float32)}
    file = write(tmp_path / "in", tensors)
    argv = ["prune", file, tmp_path / "out", "--pattern", "2:4"]
    _, _, err = run(capsys, *argv)
    words = shlex.split(err.partition("with ")[2].partition(", or choose")[0])
    code, out, err = run(capsys, *argv, *words, "--json")
    assert code == 0, err
    assert [t["path"] for t in json.loads(out)["tensors"] if t["pruned"]] == ["odd1"]


TREES = {  # params whose weights are equal, so that their order decides; and as a flat file
    "lists": {"layers": [{"kernel": W} for _ in range(11)], "layers-b": {"kernel": W}},
    "nested lists": [[W, {"a": W, "a-b": W}] for _ in range(12)],
    "names": {f"layer_{i}": {"kernel": W} for i in range(11)},
    "numbers": {str(i): {"kernel": W} for i in range(11)},
    "a file that is read": {f"layers/{i}/kernel": W for i in range(11)},
    "flat": {name: W for name in ("a", "a-b", "layer_10", "layer_2", "b")},
}


@pytest.mark.parametrize("scope", ["global", "erk"])
@pytest.mark.parametrize("name", TREES)
def test_it_prunes_as_select_does(tmp_path, capsys, name, scope):
    params = TREES[name]
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    file = write(tmp_path / "in", dict.fromkeys(paths, W))
    assert run(capsys, "prune", file, file, "--sparsity", 0.45, "--scope", scope)[0] == 0
    masks = jp.select(jp.scores.magnitude(params), 0.45, scope=scope)
    with safetensors.safe_open(file, "numpy") as pruned:
        for path, mask in zip(paths, jax.tree.leaves(masks), strict=True):
            np.testing.assert_array_equal(pruned.get_tensor(path) != 0, mask, err_msg=path)


def test_a_bar_is_shown_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "in", weights())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "B/s" in run(capsys, "prune", file, file, "--sparsity", 0.5)[2]
    assert run(capsys, "inspect", file, "--json")[2] == ""


def test_runs_as_a_module(tmp_path):
    files = write(tmp_path / "a", {"w": np.ones(2)}), write(tmp_path / "b", {"w": np.ones((1, 2))})
    command = [sys.executable, "-X", "importtime", "-m", "jaxprune", "diff", *files]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and r"2 \u2192 1\xd72" in done.stdout
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert "orbax.checkpoint" not in done.stderr  # slow, and not needed for files
