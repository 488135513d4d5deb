"""transformers' own `generate` with custom_generate: the same tokens, its settings honoured or refused by name."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import NEW, Recorder, prompts, ragged
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from beagle_sd import AdaptiveTree, Engine, custom_generate, generate
from beagle_sd.decoding.adaptive import Costs
from beagle_sd.decoding.custom_generate import SpeculativeOutput
from beagle_sd.decoding.tree import TreeShape


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


class EndsWith(StoppingCriteria):
    """Stops a row whose last tokens are `tokens`."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row[-len(self.tokens) :].tolist() == self.tokens for row in input_ids])


def test_greedy_equals_the_targets_own(pair):
    target, draft = pair
    ids, mask = ragged("left")
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    want = target.generate(ids, **settings)
    assert torch.equal(target.generate(ids, custom_generate=custom_generate(draft), **settings), want)
    whole = target.generate(
        ids,
        custom_generate=custom_generate(draft, tree=TreeShape(4, 1, 5)),
        return_dict_in_generate=True,
        **settings,
    )
    assert isinstance(whole, SpeculativeOutput) and torch.equal(whole.sequences, want)
    assert whole.report.tokens_per_round > 1.1
    assert whole.logprobs is None
    paged = custom_generate(draft, page_size=8, return_logprobs=True)
    made = target.generate(ids, custom_generate=paged, return_dict_in_generate=True, **settings)
    want_logprobs = generate(target, None, ids, mask, max_new_tokens=NEW, return_logprobs=True).logprobs
    assert torch.equal(made.sequences, want)
    torch.testing.assert_close(made.logprobs, want_logprobs, atol=1e-5, rtol=0)


def test_an_engine_or_an_adaptive_tree_is_used(pair):
    target, draft = pair
    settings = {"max_new_tokens": NEW, "do_sample": False}
    want = target.generate(prompts(1), **settings)
    tree = AdaptiveTree(Costs({1: 10.0, 6: 10.0}, {TreeShape(3, 2, 6): 0.1}), {TreeShape(3, 2, 6): 1.8})
    engine = Engine(target, draft, batch=1, capacity=want.shape[1], tree=TreeShape(3, 2, 6))
    for by in (custom_generate(draft, tree=tree, graph=False), custom_generate(draft, engine=engine)):
        made = target.generate(prompts(1), custom_generate=by, return_dict_in_generate=True, **settings)
        assert torch.equal(made.sequences, want) and made.report.tokens_per_round > 1.1
    small = Engine(target, draft, batch=1, capacity=8, tree=TreeShape(3, 2, 6))
    with pytest.raises(ValueError, match="the engine's capacity, 8"):
        target.generate(prompts(1), custom_generate=custom_generate(draft, engine=small), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
        {"min_p": 0.1, "top_k": 0},
    ],
    ids=str,
)
def test_sampling_settings_arrive_once(pair, settings):
    target, draft = pair
    ids = prompts(2)
    made = target.generate(
        ids, do_sample=True, max_new_tokens=NEW, custom_generate=custom_generate(draft, seed=3), **settings
    )
    want = generate(target, None, ids, max_new_tokens=NEW, seed=3, **{"temperature": 1.0, **settings})
    assert torch.equal(made, want.sequences)


def test_manual_seed_governs_and_returned_sequences_differ(pair):
    target, draft = pair

    def sample():
        torch.manual_seed(4)
        return target.generate(
            prompts(1),
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=NEW,
            custom_generate=custom_generate(draft),
        )

    first = sample()
    assert first.shape == (3, 11 + NEW) and len(set(map(tuple, first.tolist()))) == 3
    assert torch.equal(first, sample())


def test_end_tokens_and_stopping_criteria_end_a_row_at_its_token(pair):
    target, draft = pair
    ids = prompts(3)
    free = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    end, stop = free[0, 11 + 9].item(), free[1, 11 + 4 : 11 + 6].tolist()
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": 0}
    for criteria in (None, StoppingCriteriaList([EndsWith(stop)])):
        want = target.generate(ids, stopping_criteria=criteria, **settings)
        made = target.generate(ids, stopping_criteria=criteria, custom_generate=custom_generate(draft), **settings)
        assert torch.equal(made, want)
    assert (want[1, 11:] != 0).sum() <= 6


def test_token_0_can_be_the_end(pair):
    target, draft = pair
    ids = prompts(3)
    free = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    end = free[0, 11 + 9].item()
    swap = torch.arange(len(target.lm_head.weight))
    swap[[0, end]] = swap[[end, 0]]
    renamed = agreeable_target()
    for weight in (renamed.get_input_embeddings().weight, renamed.get_output_embeddings().weight):
        weight.data.copy_(weight.data[swap])
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 0, "pad_token_id": 1}
    want = renamed.generate(swap[ids], **settings)
    assert (want[0, 11:] == 1).any(), "no row ended early"
    made = renamed.generate(swap[ids], custom_generate=custom_generate(small_draft(renamed)), **settings)
    assert torch.equal(made, want)


def test_a_streamer_is_given_every_token_once(pair):
    target, draft = pair
    recorder = Recorder()
    made = target.generate(
        prompts(1), do_sample=False, max_new_tokens=NEW, custom_generate=custom_generate(draft, streamer=recorder)
    )
    assert sum(recorder.runs, []) == made[0].tolist() and recorder.ended == 1


def test_what_the_models_own_generation_config_says_is_honoured():
    """do_sample and filters that came with the weights; overridden in the call they are gone."""
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(1)
    target.generation_config.update(do_sample=True, temperature=0.7, top_k=9, top_p=0.8, max_new_tokens=NEW)
    by = custom_generate(draft, seed=3)
    want = generate(target, None, ids, max_new_tokens=NEW, temperature=0.7, top_k=9, top_p=0.8, seed=3).sequences
    assert torch.equal(target.generate(ids, custom_generate=by), want)
    greedy = target.generate(ids, do_sample=False)
    assert torch.equal(target.generate(ids, do_sample=False, custom_generate=by), greedy) and (greedy != want).any()
    target.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match="RepetitionPenalty.*unset in the call, as repetition_penalty=1.0"):
        target.generate(ids, custom_generate=by)
    assert torch.equal(target.generate(ids, repetition_penalty=1.0, custom_generate=by), want)


def test_chats_of_unequal_length_and_stop_strings():
    """What a tokenizer's chat template gives for a batch goes in as it is; a stop string ends its row."""
    target, tokenizer = agreeable_target(), small_tokenizer()
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in ("a", "Name rivers", "why?")]
    given = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert (given["attention_mask"] == 0).any()
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 0}
    by = custom_generate(small_draft(target))
    free = target.generate(**given, **settings)
    assert torch.equal(target.generate(**given, custom_generate=by, **settings), free)
    stop = tokenizer.decode(free[1, -20:-18])
    want = target.generate(**given, **settings, stop_strings=[stop], tokenizer=tokenizer)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    assert torch.equal(target.generate(**given, custom_generate=by, stopping_criteria=criteria, **settings), want)
    assert (want[1, -18:] == tokenizer.pad_token_id).all(), "the string did not stop its row"


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_beams": 2}, "beam_search"),
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"min_new_tokens": 3, "eos_token_id": 1}, "Min.*LogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([Ban()])}, "Ban"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_the_text_is_refused_by_name(pair, settings, named):
    target, draft = pair
    with pytest.raises(ValueError, match=f"(?s){named}.*allowed"):
        target.generate(prompts(1), max_new_tokens=4, custom_generate=custom_generate(draft), **settings)


def test_a_prompt_that_fills_max_length_is_refused(pair):
    target, draft = pair
    with pytest.raises(ValueError, match="11.*max_length"):
        target.generate(prompts(1), max_length=8, custom_generate=custom_generate(draft))
