"""transformers' own `generate` with custom_generate: the same tokens, its settings honoured or refused by name."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import NEW, Recorder, prompts, ragged
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    pipeline,
)

from beagle_sd import AdaptiveTree, Engine, custom_generate, generate
from beagle_sd.decoding.custom_generate import SpeculativeOutput
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import TreeShape


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


@pytest.mark.parametrize("given_to", ["generate", "custom_generate"])
def test_a_streamer_is_given_every_token_once(pair, given_to):
    target, draft = pair
    recorder = Recorder()
    ours, theirs = ({"streamer": recorder}, {}) if given_to == "custom_generate" else ({}, {"streamer": recorder})
    by = custom_generate(draft, **ours)
    made = target.generate(prompts(1), do_sample=False, max_new_tokens=NEW, custom_generate=by, **theirs)
    assert sum(recorder.runs, []) == made[0].tolist() and recorder.ended == 1
    if given_to == "custom_generate":
        with pytest.raises(ValueError, match="a streamer was given to generate and to custom_generate"):
            target.generate(prompts(1), max_new_tokens=4, custom_generate=by, streamer=Recorder())


@pytest.mark.parametrize("wrong", [{"guidance_scale": 1.2}, {"stopping_criteria": [lambda ids, scores: 1 / 0]}])
def test_a_failing_call_ends_its_streamer(pair, wrong):
    """Whoever reads from it in another thread would wait for ever."""
    target, draft = pair
    recorder = Recorder()
    with pytest.raises((ValueError, ZeroDivisionError)):
        target.generate(
            prompts(1), max_new_tokens=4, custom_generate=custom_generate(draft), streamer=recorder, **wrong
        )
    assert recorder.ended == 1


class Recalls(StoppingCriteria):
    """Stops row b when b + 4 tokens are behind the padded prompt; keeps what it was shown, as it was shown."""

    def __init__(self, width):
        self.width, self.shown = width, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append((input_ids.clone(), scores))
        return torch.tensor([len(row[self.width :]) >= 4 + 2 * b for b, row in enumerate(input_ids)])


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "no end"])
def test_criteria_are_asked_as_plain_generate_asks_them(pair, ends):
    """Call for call the same batch, ended rows padded; without an end token transformers pads no row."""
    target, draft = pair
    ids, mask = ragged("left")
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if ends:
        settings["eos_token_id"] = int(target.generate(ids, **settings)[3, 13])
    plain, ours = Recalls(11), Recalls(11)
    want = target.generate(ids, stopping_criteria=[plain], **settings)
    by = custom_generate(draft, tree=TreeShape(4, 4, 16))
    made = target.generate(ids, stopping_criteria=[ours], custom_generate=by, **settings)
    assert torch.equal(made, want) and len(ours.shown) == len(plain.shown) > 4
    for (shown, scores), (wanted, _) in zip(ours.shown, plain.shown, strict=True):
        assert torch.equal(shown, wanted) and scores is None


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
    penalized = generate(target, None, ids, temperature=0.7, top_k=9, top_p=0.8, seed=3, repetition_penalty=1.1)
    assert torch.equal(target.generate(ids, custom_generate=by), penalized.sequences[:, : 11 + NEW])
    assert torch.equal(target.generate(ids, repetition_penalty=1.0, custom_generate=by), want)
    target.generation_config.guidance_scale = 1.5
    with pytest.raises(ValueError, match="second forward.*unset in the call, as guidance_scale=1.0"):
        target.generate(ids, custom_generate=by)


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
    for more in ({"stopping_criteria": criteria}, {"stop_strings": [stop], "tokenizer": tokenizer}):
        assert torch.equal(target.generate(**given, custom_generate=by, **more, **settings), want)
    assert (want[1, -18:] == tokenizer.pad_token_id).all(), "the string did not stop its row"


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_beams": 2}, "beam_search"),
        ({"guidance_scale": 1.2}, "ClassifierFree"),
        ({"assistant_model": agreeable_target()}, "assistant_model"),
        ({"position_ids": torch.arange(5, 16)[None]}, "position_ids"),
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


def test_a_function_of_others_is_read_as_before(pair):
    """What transformers hands to a custom_generate that is not ours does not change."""
    seen = {}

    def other(model, input_ids, own=None, **given):
        seen.update(given, own=own)
        return input_ids

    tokenizer = small_tokenizer()
    pair[0].generate(
        prompts(1), max_new_tokens=2, custom_generate=other, own=3, streamer=Recorder(), tokenizer=tokenizer
    )
    assert seen["own"] == 3 and not {"streamer", "tokenizer"} & set(seen)


def vision_language_target():
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, image_token_id=120)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def test_a_vision_language_target_goes_on_with_text_alone():
    target = vision_language_target()
    draft = small_draft(target)
    ids, mask = ragged("left")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    text = {"attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    want = target.generate(ids, **text, **settings)
    by = custom_generate(draft)
    assert torch.equal(target.generate(ids, **text, **settings, custom_generate=by), want)
    assert torch.equal(
        generate(target, draft, ids, mask, max_new_tokens=12, pad_token_id=0, eos_token_id=1).sequences, want
    )


def test_a_transformers_that_would_lose_streamers_is_refused(monkeypatch):
    from beagle_sd.decoding import custom_generate as module

    monkeypatch.setattr(module, "_READ", "_of_another_version")
    module._hand_on_streamers.cache_clear()
    with pytest.raises(RuntimeError, match="a streamer given to it would be lost; allowed: beagle_sd.generate"):
        custom_generate(None)


def test_a_chat_pipeline_prefills_what_is_new_of_each_turn():
    target, tokenizer = agreeable_target(), small_tokenizer()
    draft = small_draft(target)
    engine = Engine(target, draft, batch=1, capacity=300, tree=TreeShape(3, 2, 6))
    write = pipeline("text-generation", model=target, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    chat, prefilled = [], []
    begin = engine.begin

    def counting(*args, **more) -> int:
        prefilled.append(begin(*args, **more))
        return prefilled[-1]

    engine.begin = counting  # type: ignore[method-assign]
    for said in ("abc", "which one?", "why is that?"):
        chat.append({"role": "user", "content": said})
        by = custom_generate(draft, engine=engine)
        made = write(chat, **options, custom_generate=by)[0]["generated_text"]
        assert made == write(chat, **options)[0]["generated_text"]
        chat = made
    whole = len(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"])
    assert len(prefilled) == 3 and prefilled[2] < whole / 2
