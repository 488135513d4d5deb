"""What the target gave the tokens of a text, its best ones in their place, and those of the prompt."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import prompts, ragged
from models import VOCAB, agreeable_target, small_draft

from beagle_sd import Engine, TreeShape, generate

TREE = TreeShape(3, 2, 6)


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


@torch.no_grad()
def scored(target, text: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of what follows each token of text [T]."""
    return target(text[None]).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 2}], ids=["greedy", "sampled"]
)
def test_they_are_those_of_scoring_the_text(pair, side, settings):
    target, draft = pair
    ids, mask = ragged(side)
    asked = {"max_new_tokens": 15, "return_logprobs": True, "top_logprobs": 4, "prompt_logprobs": True, **settings}
    made = generate(target, draft, ids, mask, tree=TREE, **asked)
    assert made.top_tokens.shape == made.top_logprobs.shape == (4, 15, 4) and made.prompt_logprobs.shape == ids.shape
    for row in range(4):
        seen = mask[row] == 1
        text = torch.cat([ids[row][seen], made.sequences[row, 11:]])
        want = scored(target, text)
        new = want[-15:]
        torch.testing.assert_close(made.logprobs[row], new.gather(1, text[-15:, None])[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(made.top_logprobs[row], new.topk(4).values, atol=1e-4, rtol=0)
        assert torch.equal(made.top_tokens[row], new.topk(4).indices)
        prompt = ids[row][seen]
        told = want[: len(prompt) - 1].gather(1, prompt[1:, None])[:, 0]
        torch.testing.assert_close(
            made.prompt_logprobs[row][seen], torch.cat([torch.zeros(1), told]), atol=1e-4, rtol=0
        )
        assert not made.prompt_logprobs[row][~seen].any()


def test_a_prompt_longer_than_what_is_scored_at_once(pair):
    target, draft = pair
    ids = prompts(1, 700 // 2)
    made = generate(target, draft, ids, max_new_tokens=3, prompt_logprobs=True, tree=TREE)
    want = scored(target, ids[0]).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(made.prompt_logprobs[0, 1:], want, atol=1e-4, rtol=0)


def test_without_asking_there_are_none(pair):
    made = generate(*pair, prompts(1), max_new_tokens=3)
    assert made.logprobs is made.top_tokens is made.top_logprobs is made.prompt_logprobs is None


def test_rows_of_unequal_length_are_padded(pair):
    target, draft = pair
    free = generate(target, draft, prompts(2), max_new_tokens=12).sequences
    end = int(free[0, 14])
    asked = {"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0, "return_logprobs": True, "top_logprobs": 2}
    made = generate(target, draft, prompts(2), tree=TREE, **asked)
    count = 1 + (made.sequences[0, 11:] == end).nonzero()[0, 0]
    assert count <= 4 and not made.logprobs[0, count:].any() and not made.top_logprobs[0, count:].any()
    assert (made.logprobs[0, :count] < 0).all()


def test_an_engine_has_room_for_them_and_a_prompt_is_run_whole_for_its_own(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=1, capacity=60, tree=TREE, return_logprobs=True, top_logprobs=3)
    ids = prompts(1, 20)
    first = generate(target, draft, ids, max_new_tokens=9, engine=engine)
    again = generate(target, draft, ids, max_new_tokens=9, engine=engine, prompt_logprobs=True)
    assert (
        again.report.prefilled == 20
        and generate(target, draft, ids, engine=engine, max_new_tokens=9).report.prefilled == 1
    )
    torch.testing.assert_close(first.logprobs, again.logprobs)
    with pytest.raises(ValueError, match="top_logprobs given with an engine; allowed: give them to Engine"):
        generate(target, draft, ids, engine=engine, top_logprobs=3)
    bare = Engine(target, draft, batch=1, capacity=60, tree=TREE)
    with pytest.raises(
        ValueError, match="prompt_logprobs given with an engine without room for them; allowed: return_log"
    ):
        generate(target, draft, ids, engine=bare, prompt_logprobs=True)
    with pytest.raises(ValueError, match=f"top_logprobs is {VOCAB + 1}; allowed: 0 to {VOCAB}"):
        generate(target, draft, ids, top_logprobs=VOCAB + 1)
