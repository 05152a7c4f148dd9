import os

import pytest

from jaxprune._atomic import replacing


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with replacing(str(path)) as new:
        new.mkdir()
        (new / "new").touch()
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["folder"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_after_an_error_nothing_has_changed(tmp_path, kind, error):
    path = tmp_path / "path"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("old")
    before = os.listdir(tmp_path)
    with pytest.raises(error), replacing(path) as new:
        new.write_text("unfinished")
        raise error
    assert os.listdir(tmp_path) == before and path.is_dir() == (kind == "folder")
    assert kind != "file" or path.read_text() == "old"


def test_a_folder_comes_back_if_its_replacement_cannot_move(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"), replacing(path) as new:
        new.mkdir()
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["folder"]
