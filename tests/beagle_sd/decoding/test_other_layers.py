"""Targets with windows, sinks, soft-caps, latent attention and recurrent layers give their own text, much accepted."""

from __future__ import annotations

import oracle_draft
import pytest
import torch
from models import small_draft

from beagle_sd import (
    Request,
    TreeShape,
    UnsupportedTarget,
    adaptive_tree,
    custom_generate,
    generate,
    generate_many,
)
from beagle_sd.decoding.engine import Engine
from beagle_sd.models.layers.attention import Span
from beagle_sd.models.target import Target
from bench.answers.kinds.tiny_targets import REACH, VOCAB, tiny_target

TREES = (
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "glm4_moe_lite",
    "ministral3",
)
CHAINS = ("qwen3_next", "qwen3_5_text", "nemotron_h", "falcon_h1", "lfm2", "mamba")
NEW = 24
WAYS = {"as it is": {}, "as on a GPU": {"fixed": True}, "in pages": {"page_size": 4}}
FIRST = ("gemma4_text", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_next", "nemotron_h")
CASES = [
    *((kind, "in pages") for kind in FIRST),
    *(pytest.param(kind, "in pages", marks=pytest.mark.slow) for kind in (*TREES, *CHAINS) if kind not in FIRST),
    *(pytest.param(kind, "as on a GPU", marks=pytest.mark.slow) for kind in (*TREES, *CHAINS)),
    *(pytest.param(kind, "as it is", marks=pytest.mark.slow) for kind in FIRST),
]
SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 3}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts padded on the left: beyond every window, across one while decoding, and a chunk's last tokens."""
    ids = torch.randint(3, VOCAB - 8, (3, 2 * REACH + 3), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, gap in enumerate((0, 2 * REACH - 2, REACH - 4)):
        ids[row, :gap] = mask[row, :gap] = 0
    return ids, mask


def shape_of(model) -> TreeShape:
    return TreeShape(4, 1, 5) if Target(model).chains_only else TreeShape(4, 3, 13)


@pytest.mark.parametrize("kind, way", CASES)
def test_the_text_is_the_targets_own(kind, way, monkeypatch):
    model, (ids, mask) = tiny_target(kind), prompts()
    monkeypatch.setattr("beagle_sd.models.target.AT_ONCE", 8)  # so that pages take turns, in the prompt too
    assert bool(Target(model).chains_only) == (kind in CHAINS)
    draft, width = small_draft(model), ids.shape[1]
    own = [
        model.generate(row[seen == 1][None], max_new_tokens=NEW, do_sample=False, use_cache=True)[0]
        for row, seen in zip(ids, mask, strict=True)
    ]
    for settings in ({}, SAMPLED):
        plain = generate(model, None, ids, mask, max_new_tokens=NEW, **settings).sequences
        if not settings:
            assert all(row[-NEW:].equal(text[-NEW:]) for row, text in zip(plain, own, strict=True))
        texts = [row[width - int(seen.sum()) :] for row, seen in zip(plain, mask, strict=True)]
        with monkeypatch.context() as patch:
            oracle_draft.know(patch, texts, VOCAB)
            engine = Engine(model, draft, batch=3, capacity=width + NEW, tree=shape_of(model), **WAYS[way])
            for _ in range(2):  # the second over what the first left
                made = generate(model, draft, ids, mask, max_new_tokens=NEW, engine=engine, **settings)
                assert made.sequences.equal(plain)
                assert made.report.tokens_per_round > 1.7
            tables = engine.buffers.cache.tables
            for span, table in tables.items():
                assert len(table.unique()) == (table.numel() if span == Span() else 3 * 7)


@pytest.mark.parametrize("way", ["as on a GPU", "in pages"])
@pytest.mark.parametrize("kind", ["gemma4_text", "llama4_text", "deepseek_v3"])
def test_heads_too_wide_for_the_kernel(kind, way, monkeypatch):
    """They go through SDPA, which reads nothing on the host either."""
    monkeypatch.setattr("beagle_sd.models.layers.attention._too_wide", lambda key, value: True)
    monkeypatch.setattr("beagle_sd.models.layers.attention.tree_attention", None)
    model, ids = tiny_target(kind), prompts()[0][:1]
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    oracle_draft.know(monkeypatch, [want[0]], VOCAB)
    engine = Engine(model, small_draft(model), batch=1, capacity=ids.shape[1] + NEW, tree=shape_of(model), **WAYS[way])
    made = generate(model, engine.draft, ids, max_new_tokens=NEW, engine=engine)
    assert made.sequences.equal(want) and made.report.tokens_per_round > 1.7


@pytest.mark.parametrize("way", ["as it is", "in pages"])
def test_what_nobody_sees_may_be_nan(way, monkeypatch):
    """As an earlier text may have left it: in prompts, and where heads are too wide for the kernel."""
    model, (ids, mask) = tiny_target("mistral"), prompts()
    monkeypatch.setattr("beagle_sd.models.layers.attention._FEW_NODES", 4)
    if way == "in pages":
        monkeypatch.setattr("beagle_sd.models.layers.attention._too_wide", lambda key, value: True)
    want = generate(model, None, ids, mask, max_new_tokens=NEW).sequences
    engine = Engine(model, None, batch=3, capacity=ids.shape[1] + NEW, **WAYS[way])
    for states in engine.buffers.cache.states:
        states.fill_(torch.nan)
    assert generate(model, None, ids, mask, max_new_tokens=NEW, engine=engine).sequences.equal(want)


@pytest.mark.parametrize("kind", CHAINS)
def test_a_branching_tree_is_refused_and_the_default_is_a_chain(kind):
    model, ids = tiny_target(kind), torch.ones(1, 5, dtype=torch.int64)
    draft = small_draft(model)
    with pytest.raises(UnsupportedTarget, match=r"recurrent layers .* use a chain: TreeShape\(3, 1, 4\).*allowed"):
        generate(model, draft, ids, tree=TreeShape(3, 2, 6))
    assert Engine(model, draft, batch=1, capacity=20).shape == TreeShape(4, 1, 5)


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h", "mamba"])
def test_behind_transformers_own_call(kind):
    model, ids = tiny_target(kind), prompts()[0][:1]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    by = custom_generate(small_draft(model))
    assert model.generate(ids, custom_generate=by, **asked).equal(model.generate(ids, **asked))


def test_an_adaptive_tree_of_a_recurrent_target_adapts_the_length_of_its_chain(tmp_path, monkeypatch):
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path))
    model, ids = tiny_target("lfm2"), prompts()[0][:1]
    draft = small_draft(model)
    tree = adaptive_tree(model, draft)
    assert {shape.branch for shape in tree.shapes if shape.num_nodes > 1} == {1}
    want = generate(model, None, ids, max_new_tokens=NEW).sequences
    assert generate(model, draft, ids, max_new_tokens=NEW, tree=tree).sequences.equal(want)


def test_a_prompt_in_parts_is_the_prompt(monkeypatch):
    """Windows, chunks and states go on from part to part, and few tokens see what many at once do."""
    for kind in (*TREES, *CHAINS):
        model, ids = tiny_target(kind), prompts()[0][:1]
        target = Target(model)
        lengths, found = torch.tensor([ids.shape[1]], dtype=torch.int32), []
        for part, few in ((512, 64), (5, 64), (512, 2)):
            monkeypatch.setattr("beagle_sd.models.target.AT_ONCE", part)
            monkeypatch.setattr("beagle_sd.models.layers.attention._FEW_NODES", few)
            with torch.inference_mode():
                found.append(target.prefill(ids, lengths, target.new_cache(1, ids.shape[1])))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, way", CASES)
def test_chats_go_on_and_prompts_take_rows_that_ended(kind, way, monkeypatch):
    """Texts of unequal length over two rows of an engine, each of two turns: in what a kind keeps of a text, what is
    held may serve, or has to be run anew; the text is that of an engine that held nothing."""
    model = tiny_target(kind)
    monkeypatch.setattr("beagle_sd.models.target.AT_ONCE", 8)
    draft, shape = small_draft(model), shape_of(model)
    engine = Engine(model, draft, batch=2, capacity=100, tree=shape, **WAYS[way])
    ids, mask = prompts()
    starts = [row[seen == 1].tolist() for row, seen in zip(ids, mask, strict=True)] * 2
    requests = [Request(one, key=one, max_new_tokens=6 + number) for number, one in enumerate(starts)]
    many, count, prefilled = generate_many(model, draft, requests, engine=engine, eos_token_id=[]), 0, 0
    for answer in many:
        text, count = [*answer.request.key, *answer.tokens.tolist()], count + 1
        alone = torch.tensor([answer.request.key])
        new = {"max_new_tokens": answer.request.max_new_tokens, "eos_token_id": []}
        assert text == generate(model, None, alone, **new).sequences[0].tolist()
        prefilled += len(answer.request.key)
        if count <= 6:
            many.add(Request([*text, 5, 6, 7], key=[*text, 5, 6, 7], max_new_tokens=7))
            many.add(Request([*text[:-3], 9], key=[*text[:-3], 9], max_new_tokens=4))  # parts before the text's end
    assert count == 18 and many.report.prefilled < prefilled
