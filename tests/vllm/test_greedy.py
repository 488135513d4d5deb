"""Greedy texts and accepted drafts of a served draft are those of plain vLLM and of `beagle_sd.generate`."""

from __future__ import annotations

import pytest
from vllm_engines import ROWS, bundled_settings, engine, own_answers, served_answers

from beagle_sd.models import smollm2


@pytest.fixture(scope="module")
def own(texts):
    return own_answers(texts)


def test_texts_are_plain_vllms_and_our_own_and_so_are_the_counts(texts, own):
    with engine(smollm2.converted()) as llm:
        plain = served_answers(llm, texts)
    with engine(smollm2.converted(), bundled_settings()) as llm:
        served = served_answers(llm, texts)
    assert served.tokens == plain.tokens == own.tokens
    assert (served.rounds, served.accepted) == (own.rounds, own.accepted)
    assert served.accepted[0] > len(texts)


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "enable_chunked_prefill": True},
        {"enforce_eager": False},
    ],
    ids=["in chunks, prefixes cached", "compiled"],
)
def test_texts_and_counts_are_the_same_twice(texts, settings):
    few = texts[:ROWS]
    own = own_answers(few)
    with engine(smollm2.converted(), bundled_settings(), **settings) as llm:
        for _ in range(2):
            served = served_answers(llm, few)
            assert (served.tokens, served.rounds, served.accepted) == (own.tokens, own.rounds, own.accepted)
