"""Settings that need no text are honoured exactly, in transformers' order; the others are refused by their reasons."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers.generation
from decoding_cases import NEW, prompts, ragged
from models import VOCAB, agreeable_target, small_draft
from round_cases import TREE, begun
from transformers import (
    LogitsProcessorList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from beagle_sd import Engine, custom_generate, generate
from beagle_sd.decoding import logits
from beagle_sd.decoding.rounds import _biased


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


@pytest.fixture(scope="module")
def free(pair):
    """What the target writes to four ragged prompts with no setting: [4, NEW]."""
    ids, mask = ragged("left")
    return pair[0].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, 11:]


SETTINGS = {
    "min_new_tokens": lambda text: {"min_new_tokens": 9, "eos_token_id": text[:, 3].tolist()},
    "min_length": lambda text: {"min_length": 19, "eos_token_id": text[:, 3].tolist()},
    "suppress_tokens": lambda text: {"suppress_tokens": [*text[:, 4].tolist(), VOCAB + 5]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": text[:, 0].tolist()},
    "bad_words_ids": lambda text: {"bad_words_ids": text[:, 5:6].tolist()},
    "sequence_bias": lambda text: {"sequence_bias": [[[int(text[0, 5])], -3.5], [[int(text[1, 5])], 4.0]]},
    "all": lambda text: {
        "min_new_tokens": 7,
        "eos_token_id": text[:, 3].tolist(),
        "suppress_tokens": text[:, 4].tolist(),
        "begin_suppress_tokens": text[:, 0].tolist(),
        "sequence_bias": [[[int(text[0, 6])], 2.5]],
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_needs_no_text_is_honoured_as_plain_generate_does(pair, free, setting):
    target, draft = pair
    ids, mask = ragged("left")
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    given |= SETTINGS[setting](free)
    want = target.generate(ids, **given)
    without = target.generate(
        ids, **{name: given[name] for name in given if name in ("eos_token_id", *list(given)[:4])}
    )
    assert want.shape != without.shape or (want != without).any(), "the setting changed nothing"
    for by in (custom_generate(draft, tree=TREE), custom_generate(None)):
        assert torch.equal(target.generate(ids, **given, custom_generate=by), want)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_text_with_a_bias_does_not_depend_on_the_draft(pair, free, temperature):
    target, draft = pair
    ids, mask = ragged("right")
    settings = {"max_new_tokens": NEW, "temperature": temperature, "top_k": 20, "seed": 3, "return_logprobs": True}
    end = free[:, 2].tolist()
    bias = {int(free[0, 6]): -math.inf, int(free[1, 6]): 1.5, 7: -2}
    plain = generate(target, None, ids, mask, **settings, min_new_tokens=8, eos_token_id=end, logit_bias=bias)
    made = generate(
        target, draft, ids, mask, **settings, min_new_tokens=8, eos_token_id=end, logit_bias=bias, tree=TREE
    )
    new = made.sequences[:, 11:]
    assert torch.equal(made.sequences, plain.sequences)
    torch.testing.assert_close(made.logprobs, plain.logprobs, atol=1e-5, rtol=0)
    assert not torch.isin(new[:, :8], torch.tensor(end)).any() and not (new == int(free[0, 6])).any()
    text = torch.cat((ids[1:2], new[1:2]), 1)  # row 1 has no padding
    scored = target(text).logits[0, 10:-1].log_softmax(-1).gather(1, new[1][:, None])[:, 0]
    counted = plain.logprobs[1] != 0
    torch.testing.assert_close(made.logprobs[1][counted], scored[counted], atol=1e-4, rtol=0)


def test_an_engine_forgets_the_bias_of_the_call_before(pair, free):
    target, draft = pair
    engine = Engine(target, draft, batch=4, capacity=11 + NEW, tree=TREE)
    ids, mask = ragged("left")
    for bias in (None, {int(free[0, 4]): -math.inf}, None, {int(free[1, 4]): -math.inf}):
        want = generate(target, None, ids, mask, max_new_tokens=NEW, logit_bias=bias).sequences
        made = generate(target, draft, ids, mask, max_new_tokens=NEW, logit_bias=bias, engine=engine).sequences
        assert torch.equal(made, want)


def test_without_a_bias_nothing_is_done_to_the_logits(pair):
    engine = begun(*pair, tree=TREE)
    scores = torch.zeros(3, 2, VOCAB)
    assert _biased(scores, torch.zeros(3, 2, dtype=torch.int32), engine.buffers) is scores


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"min_new_tokens": -1}, "min_new_tokens is -1; allowed: 0 or more"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias has token 97; allowed: 0 to 96"),
        ({"logit_bias": {3: math.nan}}, "gives token 3 nan; allowed: a finite number, or -inf"),
        ({"logit_bias": {3: math.inf}}, "gives token 3 inf; allowed"),
        ({"logit_bias": {3: "1"}}, "gives token 3 1; allowed"),
    ],
)
def test_a_wrong_bias_is_named(pair, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(*pair, prompts(1), max_new_tokens=4, **wrong)


def test_a_row_that_may_say_nothing_is_an_error(pair):
    with pytest.raises(RuntimeError, match="row 0: the target gave no finite logit; check the tokens that the call"):
        generate(*pair, prompts(2), max_new_tokens=4, logit_bias=dict.fromkeys(range(VOCAB), -math.inf))


REFUSED = [
    ({"repetition_penalty": 1.2}, "RepetitionPenalty.*needs the text before.*as repetition_penalty=1.0"),
    ({"no_repeat_ngram_size": 2}, "NoRepeatNGram.*needs the text before.*as no_repeat_ngram_size=0"),
    ({"bad_words_ids": [[3], [4, 5]]}, r"bad_words_ids has \[4, 5\], which needs the text.*allowed: .*one token"),
    ({"sequence_bias": [[[4, 5], 1.0]]}, r"sequence_bias has \[4, 5\], which needs the text"),
    ({"sequence_bias": [[[VOCAB], 1.0]]}, "sequence_bias has token 97; allowed: 0 to 96"),
    ({"do_sample": True, "typical_p": 0.9}, "Typical.*filter that the kernels do not have.*as typical_p=1.0"),
    ({"do_sample": True, "epsilon_cutoff": 0.1}, "Epsilon.*filter that the kernels do not have"),
    ({"guidance_scale": 1.5}, "ClassifierFree.*second forward.*as guidance_scale=1.0"),
    ({"forced_eos_token_id": 3}, "ForcedEOS.*did not choose.*as forced_eos_token_id=None"),
    ({"renormalize_logits": True}, "LogitNormalization changes no choice"),
    ({"logits_processor": [TopKLogitsWarper(5)]}, "TopK.*without do_sample"),
    ({"logits_processor": [lambda ids, scores: scores]}, "function is not known here"),
    ({"logits_processor": [SuppressTokensAtBeginLogitsProcessor([3], 13)]}, "begins behind the prompt's end"),
    ({"do_sample": True, "logits_processor": [TopPLogitsWarper(0.9)], "temperature": 0.5}, "Temperature.*out of order"),
    ({"do_sample": True, "logits_processor": [TopKLogitsWarper(5)], "top_k": 3}, "TopK.*comes twice"),
    ({"do_sample": True, "top_k": 0, "logits_processor": [TopPLogitsWarper(0.9, min_tokens_to_keep=3)]}, "of its own"),
    (
        {
            "do_sample": True,
            "top_k": 0,
            "logits_processor": [TemperatureLogitsWarper(0.5), SuppressTokensLogitsProcessor([3])],
        },
        "SuppressTokensLogitsProcessor comes after a filter",
    ),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=[next(reversed(settings)) for settings, _ in REFUSED])
def test_every_other_setting_is_refused_for_its_reason(pair, settings, message):
    target, draft = pair
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 1, **settings}
    if "logits_processor" in given:
        given["logits_processor"] = LogitsProcessorList(given["logits_processor"])
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        target.generate(prompts(1), custom_generate=custom_generate(draft), **given)
    assert "allowed: " in str(caught.value)


def test_the_refused_are_transformers_own():
    """A name that transformers does not have would never be met; every version has most of them."""
    known = set(dir(transformers.generation))
    assert set(logits._REFUSED) - known <= {"TopHLogitsWarper"}
    assert all(re.fullmatch(r"\w+=\S+", unset) for unset, _ in logits._REFUSED.values())
