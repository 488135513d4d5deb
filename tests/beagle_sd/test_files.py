"""Files and folders appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beagle_sd.files import cache_folder, remove_remains, whole, write_json


def put(path: Path, text: str, folder: bool) -> None:
    if folder:
        path.mkdir()
        path /= "file"
    path.write_text(text)


def text_of(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_new_takes_the_place_of_the_old(folder, tmp_path):
    path = tmp_path / "above" / "name.npz"
    for text in ("one", "two"):
        with whole(path) as partial:
            assert partial.parent == path.parent and partial.suffix == ".npz"
            put(partial, text, folder)
            assert not path.exists() if text == "one" else text_of(path) == "one"
        assert text_of(path) == text and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_error_leaves_the_old(folder, tmp_path):
    put(tmp_path / "name", "old", folder)
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "name") as partial:
        put(partial, "new", folder)
        raise KeyboardInterrupt
    assert text_of(tmp_path / "name") == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_another_process_finished_first_may_stay(tmp_path):
    with whole(tmp_path / "name", keep=lambda path: path.read_text() == "theirs") as partial:
        partial.write_text("ours")
        (tmp_path / "name").write_text("theirs")
    assert (tmp_path / "name").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_a_file_where_a_folder_stands_is_an_error_that_names_it(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(OSError, match="name is a folder; allowed: the name of a file"):
        write_json(tmp_path / "name", 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "name"]


_KILLED = """
import os, signal, sys
from beagle_sd.files import whole
with whole(sys.argv[1]) as partial:
    partial.mkdir()
    (partial / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_remains_of_a_killed_process_go_and_those_of_others_stay(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "name")], env=environment)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "name").exists()
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / left.name.replace(".", ".another-machine", 1)
    elsewhere.mkdir()
    with whole(tmp_path / "other") as in_progress:
        in_progress.touch()
        remove_remains(tmp_path)
        assert {elsewhere, in_progress} == set(tmp_path.iterdir())


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": [1, "ü"]}


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BEAGLE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "beagle_sd"
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
