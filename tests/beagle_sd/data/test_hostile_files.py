"""Damaged and hostile files: named in an error, or read as what they are; never a crash or a wrong token."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCAB
from safetensors.torch import load_file, save_file
from shard_cases import MANIFEST, random_sequence

from beagle_sd.data.conversations import read_answers, read_messages
from beagle_sd.data.dataset import StateDataset
from beagle_sd.data.rows import LeftOut
from beagle_sd.data.shards import ShardError, ShardWriter, read_shard, shard_paths

property_test = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def shard(tmp_path):
    writer = ShardWriter(tmp_path, MANIFEST)
    for index in range(5):
        writer.add(random_sequence(index, 6 + index))
    writer.flush()
    (path,) = shard_paths(tmp_path)
    return path


def test_flipped_and_cut_bytes_of_a_shard(shard):
    """Flips in the header, where sizes and offsets stand, and cuts anywhere."""
    whole = shard.read_bytes()

    @property_test
    @given(st.integers(0, 700), st.integers(0, 255), st.integers(0, len(whole)))
    def damaged(place, value, length):
        content = bytearray(whole[:length])
        if place < len(content):
            content[place] = value
        shard.write_bytes(content)
        try:
            sequences = read_shard(shard)
        except ShardError as error:
            assert str(shard) in str(error)
        else:
            assert all(len(s.tokens) == len(s.loss_mask) == len(s.states) for s in sequences)

    damaged()


@pytest.mark.parametrize(
    "name, change",
    [
        ("lengths", lambda x: x * -1),
        ("lengths", lambda x: x + torch.tensor([-20, 20, 0, 0, 0], dtype=x.dtype)),
        ("lengths", lambda x: x.float()),
        ("loss_mask", lambda x: x[:-1]),
        ("states", lambda x: x[:-3]),
        ("states", lambda x: x[:, 0]),
        ("tokens", lambda x: x.float()),
        ("tokens", lambda x: x[None]),
        ("index", lambda x: x[:-1]),
        ("final_token", lambda x: x[:0]),
        ("temperature", lambda x: x[:2]),
    ],
)
def test_a_shard_whose_parts_do_not_fit_is_named(shard, name, change):
    data = load_file(shard)
    save_file({**data, name: change(data[name]).contiguous()}, shard)
    with pytest.raises(ShardError, match=shard.name):
        StateDataset(shard.parent)


@property_test
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_line_is_a_conversation_or_named(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    left = LeftOut()
    found = list(read_messages(path, left))
    assert all(set(message) == {"role", "content"} for _, messages in found for message in messages)
    assert left.count or record == [] or found, "read, or told of"
    if left.count:
        with pytest.raises(ValueError, match="(line|item) 1: "):
            list(read_messages(path, LeftOut(strict=True)))


GOOD = b'{"messages": [{"role": "user", "content": "a"}]}'


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\xff{", "not UTF-8"),
        (GOOD[:-1], "not JSON"),
        (b"[" * 100_000, "no JSON that can be read"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "no JSON that can be read"),
    ],
    ids=["not utf-8", "cut short", "deeply nested", "a number too long"],
)
def test_lines_that_are_no_json_are_named(tmp_path, content, reason):
    path, left = tmp_path / "lines.jsonl", LeftOut()
    path.write_bytes(content + b"\n" + GOOD)
    assert [index for index, _ in read_messages(path, left)] == [1]
    (line,) = left.lines()
    assert line.startswith(f"left out 1: {reason}") and line.endswith(f"(first: {path}: line 1)")
    with pytest.raises(ValueError, match=r"lines\.jsonl: line 1: "):
        list(read_messages(path, LeftOut(strict=True)))


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": np.array([-3, 8], dtype=np.int32)},
        {"lengths": np.array([9, 9], dtype=np.int32)},
        {"lengths": np.array([2.5, 2.5])},
        {"prompt_lengths": np.array([1], dtype=np.int32)},
        {"learn": np.zeros(5, np.uint8)},
        {"learn": np.zeros(2, np.uint8)},
        {"learn": np.zeros(1, np.int64)},
        {"ids": np.array(["a"] * 5)},
        {"index": np.array([[0], [1]])},
    ],
    ids=str,
)
def test_answers_whose_parts_do_not_fit_are_named(tmp_path, change):
    path = tmp_path / "answers.npz"
    parts = {
        "ids": np.arange(5) % VOCAB,
        "lengths": np.array([2, 3], dtype=np.int32),
        "prompt_lengths": np.array([1, 1], dtype=np.int32),
        "temperature": np.zeros(2, dtype=np.float32),
        "index": np.arange(2, dtype=np.int32),
    }
    np.savez(path, **parts)
    assert len(list(read_answers(path, 100))) == 2
    np.savez(path, **{**parts, **change})
    with pytest.raises(ValueError, match=r"answers\.npz"):
        list(read_answers(path, 100))
