"""A chat's ids turn by turn: those of before stay as they are, whatever template and tokenizer."""

from __future__ import annotations

import chat_templates as shapes
import pytest
from tokenizers_for_tests import chat_tokenizer, small_tokenizer

from beagle_sd.data.chats import encode_chat
from beagle_sd.data.dialogue import Dialogue
from beagle_sd.data.rows import Unusable

ASKED, ANSWERED = ["Q1 is long", "Q2", "Q3"], ["A1, and more", "A2"]
GOING_ON = ("CHATML", "QWEN25", "QWEN3", "LLAMA3", "GEMMA", "LLAMA2", "MISTRAL", "PHI3", "PARTS_ALONE")


def begun(shape, *, ended: bool, system: str = ""):
    tokenizer = chat_tokenizer(shape)
    (end,) = tokenizer.convert_tokens_to_ids([shape.end.strip() or "<|pad|>"])
    dialogue = Dialogue(tokenizer, [end], system)
    return dialogue, [end] if ended else []


def said(dialogue, end, answers=ANSWERED) -> list[list[int]]:
    """The prompts of ASKED, answered by `answers` with `end` behind."""
    prompts = []
    for asked, answered in zip(ASKED, [*answers, "A3"], strict=True):
        prompt = dialogue.prompt(asked)
        prompts.append(prompt.ids)
        dialogue.add(prompt, dialogue.tokenizer(answered)["input_ids"] + end)
    return prompts


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", GOING_ON)
def test_a_prompt_begins_as_the_one_before_and_its_answer(name, ended):
    shape = getattr(shapes, name)
    dialogue, end = begun(shape, ended=ended)
    first, second, third = prompts = said(dialogue, end)
    for before, after, answer in zip(prompts, prompts[1:], ANSWERED):
        kept = before + dialogue.tokenizer(answer)["input_ids"]
        assert after[: len(kept)] == kept and len(after) > len(kept) + len("Q2")
    for prompt, count in ((first, 0), (second, 1), (third, 2)):
        fresh = encode_chat(dialogue.tokenizer, dialogue.turns[: 2 * count + 1])
        one, other = (dialogue.tokenizer.decode(ids) for ids in (prompt, fresh))
        assert "".join(one.split()) == "".join(other.split()), "the template's own text, but for blanks"


def test_ids_that_the_text_would_not_give_again_are_kept():
    """The unknown token's text is another token's."""
    tokenizer = small_tokenizer()
    dialogue = Dialogue(tokenizer, [tokenizer.eos_token_id])
    asked = dialogue.prompt("ab")
    prompt = asked.ids
    odd = [*tokenizer("a<|im_")["input_ids"], *tokenizer("end|>")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer(tokenizer.decode(odd))["input_ids"] != odd
    dialogue.add(asked, odd)
    assert dialogue.prompt("c").ids[: len(prompt) + len(odd)] == prompt + odd


def test_thoughts_that_the_template_drops_have_the_chat_encoded_anew():
    for shape in (shapes.QWEN3, shapes.QWEN3_THINKING, shapes.R1_DISTILLED):
        dialogue, end = begun(shape, ended=True)
        prompts = said(dialogue, end, ["<think>\nT1\n</think>\n\nA1", "A2"])
        assert prompts[1] == encode_chat(dialogue.tokenizer, dialogue.turns[:3])
        assert "T1" not in dialogue.tokenizer.decode(prompts[1])
        assert prompts[2] == encode_chat(dialogue.tokenizer, dialogue.turns[:5])


@pytest.mark.parametrize("name", ["NUMBERED", "HEADERS_ALONE"])
def test_a_template_that_renders_turns_otherwise_has_the_chat_encoded_anew(name):
    """It numbers them, or puts a header before the answer that no prompt has."""
    dialogue, end = begun(getattr(shapes, name), ended=True)
    for count, prompt in enumerate(said(dialogue, end)):
        assert prompt == encode_chat(dialogue.tokenizer, dialogue.turns[: 2 * count + 1])


def test_the_system_stays_and_a_new_one_begins_anew():
    dialogue, end = begun(shapes.CHATML, ended=True, system="be brief")
    first = dialogue.prompt("Q1")
    assert "be brief" in first.text
    said(dialogue, end)
    dialogue.forget()
    assert dialogue.prompt("Q1") == first and not dialogue.ids
    said(dialogue, end)
    dialogue.set_system("")
    assert not dialogue.turns and "be brief" not in dialogue.prompt("Q1").text


def test_a_system_that_the_template_refuses_changes_nothing():
    dialogue, end = begun(shapes.GEMMA, ended=True)
    said(dialogue, end)
    before = dialogue.prompt("Q4")
    with pytest.raises(Unusable, match="System role not supported"):
        dialogue.set_system("be brief")
    assert dialogue.prompt("Q4") == before
    with pytest.raises(Unusable, match="System role not supported"):
        begun(shapes.GEMMA, ended=True, system="be brief")


def test_a_turn_without_an_answer_is_not_kept():
    dialogue, end = begun(shapes.CHATML, ended=True)
    said(dialogue, end)
    before = dialogue.prompt("Q4")
    dialogue.add(dialogue.prompt("Q0"), [])
    assert dialogue.prompt("Q4") == before
    dialogue.add(before, end)
    assert dialogue.prompt("Q5").ids[: len(before.ids) + 1] == before.ids + end
