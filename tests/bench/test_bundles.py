"""Folders as files of bounded size: what comes out is what went in, and what is missing or damaged is named."""

from __future__ import annotations

import os

import pytest

from bench.recipes.one_gpu.bundles import pack, unpack


def test_a_folder_comes_out_of_its_parts_as_it_went_in(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "noise").write_bytes(os.urandom(300_000))
    (source / "empty").write_bytes(b"")
    paths = pack(source, tmp_path / "parts", "state", 100_000)
    assert [path.name for path in paths][-2:] == ["state.part3", "state.json"]
    assert all(path.stat().st_size <= 100_000 for path in paths)
    out = unpack(tmp_path / "parts", "state", tmp_path / "out")
    assert (out / "deep" / "noise").read_bytes() == (source / "deep" / "noise").read_bytes()
    assert sorted(path.name for path in out.rglob("*")) == ["deep", "empty", "noise"]


def test_missing_and_damaged_parts_are_named(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "noise").write_bytes(os.urandom(3000))
    paths = pack(tmp_path / "source", tmp_path, "state", 4000)
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="state in .* another checksum"):
        unpack(tmp_path, "state", tmp_path / "out")
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks state.part1 of state's \d parts"):
        unpack(tmp_path, "state", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="part_bytes is 0"):
        pack(tmp_path / "source", tmp_path, "state", 0)
