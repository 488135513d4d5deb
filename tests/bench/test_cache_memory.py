"""Bytes of the target's cache, whole and in pages, against those reckoned from a config."""

from __future__ import annotations

import pytest

from bench.answers import cache_memory


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma3_text"])
def test_bytes_are_those_of_the_config(kind):
    row = cache_memory.row(kind)
    layers, heads, width, window, full = {
        "gpt_oss": (36, 8, 64, 128, 18),
        "gemma3_text": (26, 4, 256, 4096, 4),
    }[kind]
    assert (row["layers"], row["with_window"], row["window"]) == (layers, layers - full, window)
    slot, slots, page = 2 * heads * width * 2, cache_memory.TOKENS - 1 + 60, cache_memory.PAGE
    assert row["whole"] == layers * slots * slot
    turns = -(-(window + 512) // page) + 1
    assert row["pages"] == (full * -(-slots // page) + (layers - full) * turns) * page * slot
