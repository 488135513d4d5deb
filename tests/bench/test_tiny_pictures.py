"""Pictures for tiny models: the models' own generate takes them, sees them, and says the same for padded rows."""

from __future__ import annotations

import pytest
import torch

from bench.answers.kinds.own_text import own_text, stepped_logits
from bench.answers.kinds.tiny_pictures import KINDS, SPECIAL, pictured_target, pictures
from bench.answers.kinds.tiny_targets import VOCAB

NEW = 12
MADE = (
    "gemma3 gemma4 glm4v idefics3 internvl llava llava_next mistral3 paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_vl "
    "smolvlm"
).split()


@pytest.mark.parametrize("kind", MADE)
def test_a_picture_changes_the_text_and_rows_are_padded_without_harm(kind):
    model = pictured_target(kind)
    one, other = pictures(kind, model), pictures(kind, model, seed=1)
    assert one["input_ids"].equal(other["input_ids"])
    text = own_text(model, one, NEW)
    assert not text.equal(own_text(model, other, NEW))
    both = pictures(kind, model, (0, 1))
    assert (both["attention_mask"].sum(1) < both["input_ids"].shape[1]).tolist() == [False, True]
    assert own_text(model, both, NEW).equal(torch.cat([text, own_text(model, pictures(kind, model, (1,)), NEW)]))


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3"])
def test_the_second_row_has_a_picture_of_another_size_or_none(kind):
    model = pictured_target(kind)
    shown = (pictures(kind, model, (0, 1))["input_ids"] == model.config.image_token_id).sum(1)
    assert shown.tolist() == ([4, 2] if kind == "qwen2_vl" else [4, 0])


def test_token_types_tell_pictures_from_text():
    for kind, name in (("gemma3", "token_type_ids"), ("qwen3_vl", "mm_token_type_ids")):
        model = pictured_target(kind)
        given = pictures(kind, model)
        assert given[name].equal((given["input_ids"] == model.config.image_token_id).long())
        assert SPECIAL <= model.config.image_token_id < VOCAB


@pytest.mark.parametrize("kind", ["llava", "janus"])
def test_the_logits_of_steps_are_those_of_the_text_that_was_said(kind):
    model = pictured_target(kind)
    prompts = pictures(kind, model)
    text = own_text(model, prompts, NEW)
    assert stepped_logits(model, prompts, text).argmax(-1).equal(text)
    other = (text + 1) % SPECIAL
    logits = stepped_logits(model, prompts, other)[0]
    ids = torch.cat([prompts["input_ids"], other], 1)
    given = {"input_ids": ids, "pixel_values": prompts["pixel_values"], "use_cache": False}
    with torch.inference_mode():
        whole = model(**given).logits[0, -NEW - 1 : -1]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


def test_nothing_for_kinds_without_pictures():
    assert "llama" not in KINDS
    assert pictures("mistral4", pictured_target("mistral4")) is None
