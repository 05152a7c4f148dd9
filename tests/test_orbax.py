import builtins
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from files import run, same_bits, weights
from helpers import bits, explicit_and_slowly_auto, mesh, place, python
from jax.sharding import NamedSharding
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


def test_other_folders_are_not_replaced(tmp_path, capsys, checkpoint):
    path, _ = checkpoint
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("precious")
    for out in (home, home / "thesis"):
        code, _, err = run(capsys, "prune", path, out, "--sparsity", 0.5)
        assert code == 2 and "not an Orbax checkpoint" in err
        assert (home / "thesis").read_text() == "precious"
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and f"Pass the one inside, {path}" in err


def test_a_folder_that_cannot_be_replaced_stays(capsys, monkeypatch, checkpoint):
    path, _ = checkpoint
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = run(capsys, "prune", path, path, "--sparsity", 0.5)
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


DAMAGES = {
    "_METADATA": "its metadata cannot be read",
    "manifest.ocdbt": "its metadata cannot be read",
    "array_metadatas/process_0": "Expecting value",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(capsys, checkpoint, name):
    path, _ = checkpoint
    (path / name).write_bytes(b"")
    code, out, err = run(capsys, "inspect", path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    message = f"jaxprune: {path}: Orbax could not process this checkpoint ({DAMAGES[name]}"
    assert err.startswith(message) and err.endswith("Check that it is complete.\n")


def test_a_checkpoint_without_its_arrays_is_one_line(capsys, checkpoint):
    path, _ = checkpoint
    shutil.rmtree(path / "d")
    code, out, err = run(capsys, "diff", path, path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"jaxprune: {path}: Orbax could not process this checkpoint")


def test_an_error_of_orbax_while_it_saves_leaves_the_old_folder(
    tmp_path, capsys, monkeypatch, checkpoint
):
    path, _ = checkpoint
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def fail(*arguments, **options):
        raise RuntimeError("an error\nof two lines")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", fail)
    code, _, err = run(capsys, "prune", path, path, "--sparsity", 0.5)
    assert code == 2 and "(an error of two lines)" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_without_orbax_the_extra_is_named(capsys, monkeypatch, checkpoint):
    path, _ = checkpoint
    original = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("orbax"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, _, err = run(capsys, "inspect", path)
    assert code == 2 and "pip install 'jaxprune[orbax]'" in err and err.count("\n") == 1


@explicit_and_slowly_auto
def test_a_training_is_restored_onto_another_mesh(tmp_path, kind):
    def training(mesh, w_axis, b_axis):
        keys = jax.random.split(jax.random.key(0), 2)
        params = {"w": jax.random.normal(keys[0], (16, 8)), "b": jax.random.normal(keys[1], (8,))}
        params = place(params, mesh, {"w": P(None, w_axis), "b": P(b_axis)})
        masks = jp.select(jp.scores.magnitude(params), 0.5)
        params = jp.apply_masks(params, masks)
        last = jp.recipes.Round(1, 0.5, params, masks)
        state = jp.enforce(optax.adam(0.1), masks).init(params)
        return {"params": params, "state": state, "last": last, "key": jax.random.key(3)}

    def abstract(leaf):
        if isinstance(leaf, int | float):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    saved, expected = training(mesh(kind, x=8), "x", "x"), training(mesh(kind, a=2, b=4), "a", "b")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", jp.masks.pack(saved))
        checkpointer.save(tmp_path / "plain", saved)
    like = jax.tree.map(abstract, expected)
    with ocp.StandardCheckpointer() as checkpointer:
        packed = checkpointer.restore(tmp_path / "packed", jp.masks.pack(like))
        plain = checkpointer.restore(tmp_path / "plain", like)
    assert packed["state"].masks["w"].nbytes == 16 * 8 // 8
    for restored in (jp.masks.unpack(packed, like), plain):
        assert bits(restored) == bits(expected)
        for w, v in zip(*map(jax.tree.leaves, (restored, expected)), strict=True):
            if isinstance(w, jax.Array) and isinstance(v.sharding, NamedSharding):
                assert w.sharding.is_equivalent_to(v.sharding, 2)
        (after,) = jp.recipes.iterative(
            restored["last"], lambda params, masks: params, jp.scores.magnitude, [0.5, 0.75]
        )
        assert (after.round, after.sparsity) == (2, 0.75)


@pytest.mark.slow
def test_killed_trainings_lose_nothing():
    printed = python(Path(__file__).with_name("kill_resume.py"), "--trials", "10")
    assert "kills: 10" in printed.splitlines()
