"""Settings are honoured exactly, in transformers' order, at every node by its own text; few are refused."""

from __future__ import annotations

import math
import re
from inspect import signature

import pytest
import torch
import transformers.generation
from decoding_cases import NEW, odd_one, prompts, ragged
from models import VOCAB, agreeable_target, small_draft
from round_cases import TREE, begun
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)

from beagle_sd import Engine, TreeShape, custom_generate, generate
from beagle_sd.decoding.settings import processors


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


@pytest.fixture(scope="module")
def free(pair):
    """What the target writes to four ragged prompts with no setting: [4, NEW]."""
    ids, mask = ragged("left")
    return pair[0].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, 11:]


TREES = [TREE, pytest.param(TreeShape(3, 1, 4), marks=pytest.mark.slow)]


def pairs_of(text) -> list[list[int]]:
    """Tokens that follow each other in what is written."""
    return [[int(row[at]), int(row[at + 1])] for row in text for at in (2, 5, 9)]


SETTINGS = {
    "min_new_tokens": lambda text: {"min_new_tokens": 9, "eos_token_id": text[:, 3].tolist()},
    "min_length": lambda text: {"min_length": 19, "eos_token_id": text[:, 3].tolist()},
    "suppress_tokens": lambda text: {"suppress_tokens": [*text[:, 4].tolist(), VOCAB + 5]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": text[:, 0].tolist()},
    "bad_words_ids": lambda text: {"bad_words_ids": [*text[:, 5:6].tolist(), *pairs_of(text)]},
    "sequence_bias": lambda text: {"sequence_bias": [[[int(text[0, 5])], -3.5], [[int(text[1, 5])], 4.0]]},
    "phrases": lambda text: {
        "sequence_bias": [*([pair, -9.0] for pair in pairs_of(text)), [[3, 4, 5], 30.0], [[3], 4.0]]
    },
    "repetition_penalty": lambda text: {"repetition_penalty": 1.4},
    "encouraged": lambda text: {"repetition_penalty": 0.8},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 2},
    "no token twice": lambda text: {"no_repeat_ngram_size": 1},
    "a processor": lambda text: {"logits_processor": [odd_one]},
    "allowed": lambda text: {"prefix_allowed_tokens_fn": allowed},
    "forced": lambda text: {"forced_bos_token_id": 7, "forced_eos_token_id": 3},
    "decay": lambda text: {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 3},
    "begins later": lambda text: {"logits_processor": [SuppressTokensAtBeginLogitsProcessor(text[:, 2].tolist(), 13)]},
    "renormalize": lambda text: {"renormalize_logits": True, "repetition_penalty": 1.2},
    "watermark": lambda text: {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "in another order": lambda text: {
        "logits_processor": [RepetitionPenaltyLogitsProcessor(1.3), SequenceBiasLogitsProcessor([[[4], 2.0]])]
    },
    "all": lambda text: {
        "min_new_tokens": 7,
        "eos_token_id": text[:, 3].tolist(),
        "suppress_tokens": text[:, 4].tolist(),
        "begin_suppress_tokens": text[:, 0].tolist(),
        "sequence_bias": [[[int(text[0, 6])], 2.5], [[3, 4], 5.0]],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": pairs_of(text),
    },
    "all, and a processor": lambda text: {
        "sequence_bias": [[[int(text[0, 6])], 2.5], [[3, 4], 5.0]],
        "repetition_penalty": 1.2,
        "bad_words_ids": pairs_of(text),
        "logits_processor": [odd_one],
    },
}
PENALISES_PADDING = "Tensor" not in str(signature(RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"])
"""As older versions of transformers do."""
ON_HOST = {"a processor", "allowed", "forced", "decay", "begins later", "renormalize", "watermark", "in another order"}


def allowed(row: int, text: torch.Tensor) -> list[int]:
    """Another third of the vocabulary in each row, another after each token."""
    return list(range((int(text[-1]) + row) % 3, VOCAB, 3))


def plain_and_ours(pair, ids, mask, given, tree=TREE):
    """What transformers writes, and our loop behind its call, with the draft and without."""
    target, draft = pair
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **given}
    if "logits_processor" in given:
        given["logits_processor"] = LogitsProcessorList(given["logits_processor"])
    want = target.generate(ids, **given)
    ours = [
        target.generate(ids, **given, return_dict_in_generate=True, custom_generate=by)
        for by in (custom_generate(draft, tree=tree), custom_generate(None))
    ]
    return want, ours


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_honoured_as_plain_generate_does(pair, free, setting, tree):
    ids, mask = ragged("left")
    given = SETTINGS[setting](free)
    for rows in (slice(0, 4), slice(1, 2)):  # the second has no padding
        want, ours = plain_and_ours(pair, ids[rows], mask[rows], given, tree)
        without, _ = plain_and_ours(
            pair, ids[rows], mask[rows], {name: given[name] for name in given if name.startswith("eos")}
        )
        if rows.stop == 4:
            assert want.shape != without.shape or (want != without).any(), "the setting changed nothing"
        for made in ours:
            assert torch.equal(made.sequences, want)
        counts_padding = "no_repeat_ngram_size" in given or (PENALISES_PADDING and "repetition_penalty" in given)
        on_host = setting in ON_HOST or "logits_processor" in given or (rows.stop == 4 and counts_padding)
        assert ours[0].report.on_host == on_host


@pytest.mark.slow
@pytest.mark.parametrize("tree", [TREE, TreeShape(3, 1, 4)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sampled_text_with_a_setting_does_not_depend_on_the_draft(pair, free, setting, tree):
    target, draft = pair
    ids, mask = ragged("left")
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": True, "pad_token_id": 0, "top_p": 0.95}
    given |= SETTINGS[setting](free)
    if "logits_processor" in given:
        given["logits_processor"] = LogitsProcessorList(given["logits_processor"])
    texts = []
    for own in (None, draft):
        torch.manual_seed(3)
        texts.append(target.generate(ids, **given, custom_generate=custom_generate(own, tree=tree if own else None)))
    assert torch.equal(*texts)


WARPERS = {
    "typical_p": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01, "top_k": 30},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "in another order": {"logits_processor": [TopPLogitsWarper(0.9)], "temperature": 0.5},
    "twice": {"logits_processor": [TopKLogitsWarper(5)], "top_k": 3},
    "more kept": {"top_k": 0, "logits_processor": [TopPLogitsWarper(0.3, min_tokens_to_keep=3)]},
    "then suppressed": {
        "top_k": 0,
        "logits_processor": [TemperatureLogitsWarper(0.5), SuppressTokensLogitsProcessor([3])],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", WARPERS)
def test_filters_that_the_kernels_do_not_have_are_applied_as_transformers_applies_them(pair, setting):
    """The same text with the draft and without it; and of one token, drawn often, the law that transformers gives."""
    target, draft = pair
    given = {"do_sample": True, "pad_token_id": 0, **WARPERS[setting]}
    if "logits_processor" in given:
        given["logits_processor"] = LogitsProcessorList(given["logits_processor"])
    texts = []
    for own in (None, draft):
        torch.manual_seed(3)
        by = custom_generate(own, tree=TREE if own else None)
        texts.append(target.generate(prompts(4), **given, max_new_tokens=NEW, custom_generate=by))
    assert torch.equal(*texts)
    ids = prompts(1).expand(4000, -1)
    theirs = target.generate(ids, **given, max_new_tokens=1)[:, -1].bincount(minlength=VOCAB)
    ours = target.generate(ids, **given, max_new_tokens=1, custom_generate=custom_generate(None))[:, -1]
    ours = ours.bincount(minlength=VOCAB)
    assert ((theirs == 0) == (ours == 0))[(theirs + ours) > 40].all()
    both = (theirs + ours).clamp(min=1)
    assert ((ours - theirs) ** 2 / both).sum() < VOCAB, "two draws of 4000 from one law"


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


def test_without_rules_nothing_is_done_to_the_logits(pair):
    engine = begun(*pair, tree=TREE)
    assert engine.shaping is None
    generate(*pair, prompts(3), max_new_tokens=4, engine=engine, repetition_penalty=1.2)
    assert engine._shaping() is engine.shaping is not None
    generate(*pair, prompts(3), max_new_tokens=4, engine=engine)
    assert engine._shaping() is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"min_new_tokens": -1}, "min_new_tokens is -1; allowed: 0 or more"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias has token 97; allowed: 0 to 96"),
        ({"logit_bias": {3: math.nan}}, "gives token 3 nan; allowed: a finite number, or -inf"),
        ({"logit_bias": {3: math.inf}}, "gives token 3 inf; allowed"),
        ({"logit_bias": {3: "1"}}, "gives token 3 1; allowed"),
        ({"sequence_bias": {(3, VOCAB): 1.0}}, "sequence_bias has token 97; allowed: 0 to 96"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias has an empty sequence; allowed: a token or more"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids has token -1; allowed: 0 to 96"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: above 0, 1 for none"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan; allowed: a finite number, 1 for none"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; allowed: a finite number, 0 for none"),
        ({"presence_penalty": "1"}, "presence_penalty is 1; allowed: a finite number, 0 for none"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; allowed: 0 or more"),
    ],
)
def test_a_wrong_bias_is_named(pair, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(*pair, prompts(1), max_new_tokens=4, **wrong)


def test_a_row_that_may_say_nothing_is_an_error(pair):
    with pytest.raises(RuntimeError, match="row 0: the target gave no finite logit; check the tokens that the call"):
        generate(*pair, prompts(2), max_new_tokens=4, logit_bias=dict.fromkeys(range(VOCAB), -math.inf))


REFUSED = [
    ({"sequence_bias": [[[VOCAB], 1.0]]}, "sequence_bias has token 97; allowed: 0 to 96"),
    ({"sequence_bias": [[[4, VOCAB], 1.0]]}, "sequence_bias has token 97; allowed: 0 to 96"),
    ({"guidance_scale": 1.5}, "ClassifierFree.*second forward.*as guidance_scale=1.0"),
    ({"encoder_repetition_penalty": 1.5}, "EncoderRepetition.*of the batch.*as encoder_repetition_penalty=1.0"),
    ({"logits_processor": [TopKLogitsWarper(5)]}, "TopK.*without do_sample"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=[next(reversed(settings)) for settings, _ in REFUSED])
def test_what_cannot_be_had_is_refused_for_its_reason(pair, settings, message):
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
    assert set(processors._REFUSED) - known == set()
    assert all(re.fullmatch(r"\w+=\S+", unset) for unset, _ in processors._REFUSED.values())
