"""Coupled sampling in vLLM: the served text is that of `beagle_sd.generate` with the same seed, and the draft leans.

Logits processors under speculation belong to vLLM's second runner, whose kernels are Triton's: here interpreted, which
must be so before vLLM is imported. `make test-vllm` runs this file by itself.
"""

from __future__ import annotations

import os

import pytest
from vllm_engines import bundled_settings, engine, own_answers_apart, served_answers

from beagle_sd.models import smollm2
from beagle_sd.vllm import COUPLED

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
    pytest.skip("vLLM's second runner is not asked for: vllm_engines.INTERPRETED", allow_module_level=True)

NEW_TOKENS = 24
SETTINGS = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_p": 0.9, "seed": 6},
    {},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.02, "seed": -7},
]


@pytest.fixture(scope="module")
def coupled():
    settings = {"logits_processors": [COUPLED], "max_model_len": 512, "max_num_batched_tokens": 512}
    with engine(smollm2.converted(), bundled_settings(), **settings) as llm:
        yield llm


def test_texts_and_counts_are_our_own(texts, coupled):
    extra = [{f"beagle_{name}": value for name, value in one.items()} for one in SETTINGS]
    served = served_answers(coupled, texts[:4], NEW_TOKENS, extra)
    own = own_answers_apart(texts[:4], NEW_TOKENS, SETTINGS)
    assert served.tokens == [tokens for answers in own for tokens in answers.tokens]
    assert served.rounds == sum(answers.rounds for answers in own)
    assert list(served.accepted) == [sum(counts) for counts in zip(*(answers.accepted for answers in own))]


def test_a_row_leans_by_no_request_that_has_ended(texts, coupled):
    """The greedy text goes on alone, in the first row, where the other was."""
    extra = [{"beagle_temperature": 1.0, "beagle_seed": 9}, {}]
    (own,) = own_answers_apart(texts[1:2], 40, [{}])
    before = served_answers(coupled, texts[:1], 4, extra[:1])
    both = served_answers(coupled, texts[:2], [4, 40], extra)
    assert both.tokens[1] == own.tokens[0]
    assert (both.rounds - before.rounds, both.accepted) == (
        own.rounds,
        tuple(a + b for a, b in zip(own.accepted, before.accepted)),
    )


def test_a_seed_gives_its_text_in_any_company(texts, coupled):
    extra = [{"beagle_temperature": 1.0, "beagle_seed": seed} for seed in (11, 12, 13)]
    together = served_answers(coupled, [texts[1]] * 3, 12, extra).tokens
    alone = [served_answers(coupled, [texts[1]], 12, [one]).tokens[0] for one in extra]
    assert together == alone and together[0] != together[1] != together[2]


def test_sampled_without_it_goes_vllms_own_way(texts, coupled):
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    prompt = {"prompt_token_ids": texts[0]}
    first, again = (coupled.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2))
    greedy = served_answers(coupled, texts[:1], 12).tokens[0]
    assert list(first) == list(again) != greedy


@pytest.mark.parametrize(
    "extra, temperature, message",
    [
        ({"beagle_seed": 1}, 0.0, "beagle_seed given without beagle_temperature above 0"),
        ({"beagle_temperature": 0.7}, 0.7, "temperature is 0.7 beside beagle_temperature; allowed: 0"),
        ({"beagle_temperature": 0.7, "beagle_topp": 0.9}, 0.0, "beagle_topp is not known; allowed: beagle_seed"),
    ],
)
def test_a_wrong_request_is_refused_and_others_go_on(texts, coupled, extra, temperature, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = SamplingParams(temperature=temperature, max_tokens=4, extra_args=extra)
    with pytest.raises(VLLMValidationError, match=message):
        coupled.generate([{"prompt_token_ids": texts[0]}], params, use_tqdm=False)
    assert served_answers(coupled, texts[:1], 4).tokens[0]
