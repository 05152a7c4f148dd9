import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from files import run, same_bits, weights
from fuzz_files import bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.filterwarnings("ignore")  # Orbax warns often


@pytest.fixture
def checkpoint(tmp_path):
    params = {
        "a": {"kernel": jnp.array(weights()["z/kernel"]), "bias": jnp.ones(8)},
        "layers": [jnp.array(weights("bfloat16")["b/kernel"]), {"flag": jnp.array([True, False])}],
        "rest": (None, {}, 1.5, 3),
    }
    opt = {"adam": optax.adam(1e-3).init(params["a"]), "key": jax.random.key(3)}
    state = {"params": params, "opt": opt}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ckpt", state)
    return tmp_path / "ckpt", state


def test_orbax_checkpoints_keep_their_structure(tmp_path, capsys, checkpoint):
    path, state = checkpoint
    code, out, err = run(capsys, "inspect", path, "--json")
    names = {jax.tree_util.keystr(k, simple=True, separator="/")
             for k, _ in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip
    assert code == 0 and err == "" and {t["path"] for t in json.loads(out)["tensors"]} == names
    argv = "prune", path, tmp_path / "new", "--sparsity", 0.6, "--exclude", "opt/*"
    code, out, err = run(capsys, *argv)
    assert code == 0 and err == ""
    with ocp.StandardCheckpointer() as checkpointer:
        after = checkpointer.restore(tmp_path / "new", state)
    assert after["opt"]["key"].dtype == state["opt"]["key"].dtype
    masks = jp.select(jp.scores.magnitude(state["params"]), 0.6)
    wanted = {**state, "params": jp.apply_masks(state["params"], masks)}
    keys = [jax.random.key_data(tree["opt"].pop("key")) for tree in (after, wanted)]
    assert jnp.array_equal(*keys)
    assert jax.tree.structure(after) == jax.tree.structure(wanted)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: same_bits(*map(np.asarray, (a, b))), after, wanted)
    )
    assert run(capsys, "diff", path, tmp_path / "new")[0] == 1
    assert run(capsys, "prune", path, path, *argv[3:])[0] == 0  # in place
    assert run(capsys, "diff", path, tmp_path / "new")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "new"]


def test_orbax_folders_are_not_replaced_lightly(tmp_path, capsys, monkeypatch, checkpoint):
    path, _ = checkpoint
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("dear")
    for out, words in (
        (home, "not an Orbax checkpoint"),
        (home / "thesis", "not an Orbax checkpoint"),
    ):
        code, _, err = run(capsys, "prune", path, out, "--sparsity", 0.5)
        assert code == 2 and words in err and (home / "thesis").read_text() == "dear"
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and f"Give the one inside, {path}" in err
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = run(capsys, "prune", path, path, "--sparsity", 0.5)
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    (path / "_METADATA").write_text("{")
    code, _, err = run(capsys, "inspect", path)
    assert code == 2 and err.startswith(f"jaxprune: {path}: ") and err.count("\n") == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_orbax_restores_a_training_onto_another_mesh(tmp_path, kind):
    def training(mesh, axes):
        place = lambda w, *spec: jax.device_put(w, NamedSharding(mesh, P(*spec)))  # noqa: E731
        keys = jax.random.split(jax.random.key(0), 2)
        w = place(jax.random.normal(keys[0], (16, 8)), None, axes[0])
        params = {"w": w, "b": place(jax.random.normal(keys[1], (8,)), axes[-1])}
        masks = jp.select(jp.scores.magnitude(params), 0.5)
        params = jp.apply_masks(params, masks)
        last = jp.recipes.Round(1, 0.5, params, masks)
        state = jp.enforce(optax.adam(0.1), masks).init(params)
        return {"params": params, "state": state, "last": last, "key": jax.random.key(3)}

    saved = training(jax.make_mesh((8,), ("x",), axis_types=(kind,)), "x")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", jp.masks.pack(saved))
        checkpointer.save(tmp_path / "plain", saved)
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    wanted = training(other, "ab")
    like = jax.tree.map(
        lambda w: w if isinstance(w, int | float)
        else jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding),
        wanted,
    )  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        packed = checkpointer.restore(tmp_path / "packed", jp.masks.pack(like))
        plain = checkpointer.restore(tmp_path / "plain", like)
    assert packed["state"].masks["w"].nbytes == 16 * 8 // 8
    for found in (jp.masks.unpack(packed, like), plain):
        assert bits(found) == bits(wanted)
        places = [
            (w.sharding, v.sharding) for w, v in zip(*map(jax.tree.leaves, (found, wanted)),
            strict=True) if isinstance(w, jax.Array)
        ]  # fmt: skip
        assert all(w.is_equivalent_to(v, 2) for w, v in places if isinstance(v, NamedSharding))
        train = lambda params, masks: params  # noqa: E731
        (after,) = jp.recipes.iterative(found["last"], train, jp.scores.magnitude, [0.5, 0.75])
        assert (after.round, after.sparsity) == (2, 0.75)


@pytest.mark.slow
def test_killed_trainings_lose_nothing():
    argv = [sys.executable, Path(__file__).with_name("kill_resume.py"), "--trials", "10"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kills: 10" in done.stdout.splitlines()
