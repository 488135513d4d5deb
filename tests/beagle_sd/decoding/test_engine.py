"""What an engine refuses, and what it leaves behind where memory ends."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoding_cases import prompts
from models import small_draft, small_target
from round_cases import TREE, fixed_engine

from beagle_sd import Engine, GraphError, generate
from beagle_sd.decoding.graph import check_capturable
from beagle_sd.decoding.trees.tree import TreeShape


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"engine": (2, 40), "input_ids": prompts(3)}, "3 rows were given to an engine for 2"),
        ({"engine": (2, 20)}, "need room for 23; allowed: the engine's capacity, 20"),
        ({"engine": (2, 40), "tree": TREE, "return_logprobs": True}, "tree, return_logprobs given with an engine"),
        ({"engine": (2, 40), "draft": None}, "made for another target or draft"),
        ({"page_size": 0}, "page_size is 0"),
    ],
)
def test_bad_requests(pair, wrong, message):
    target, draft = pair
    options = {"input_ids": prompts(2), "draft": draft, "max_new_tokens": 12, **wrong}
    if sizes := options.pop("engine", None):
        options["engine"] = Engine(target, draft, batch=sizes[0], capacity=sizes[1])
    with pytest.raises(ValueError, match=message):
        generate(target, **options)


def test_a_graph_asked_for_where_none_can_be_says_why(pair, monkeypatch):
    target, draft = pair
    with pytest.raises(GraphError, match="the target is on cpu and a graph is CUDA's; allowed: graph=False"):
        generate(target, draft, prompts(1), graph=True)
    monkeypatch.setattr("beagle_sd.decoding.graph.backends.resolve", lambda *_: "reference")
    with pytest.raises(GraphError, match=r"choose_tokens has only its reference here \(cuda: .*allowed: graph=False"):
        check_capturable(torch.device("cuda"), torch.float32)


def test_another_vocabulary_after_the_engine_is_refused():
    target = small_target()
    draft, ids = small_draft(target, draft_vocab=torch.arange(0, 97, 2)), torch.arange(1, 9)[None]
    engine = Engine(target, draft, batch=1, capacity=20)
    before = generate(target, draft, ids, max_new_tokens=8, engine=engine)
    draft.set_draft_vocab(torch.arange(1, 97, 2))
    with pytest.raises(ValueError, match="another vocabulary after the engine was made; allowed: an engine made after"):
        generate(target, draft, ids, max_new_tokens=8, engine=engine)
    made = Engine(target, draft, batch=1, capacity=20)
    assert generate(target, draft, ids, max_new_tokens=8, engine=made).sequences.equal(before.sequences)


def test_engines_out_of_range(pair):
    for wrong in ({"batch": 0, "capacity": 9}, {"batch": 1, "capacity": 1}):
        with pytest.raises(ValueError, match="allowed: at least"):
            Engine(*pair, **wrong)


@pytest.mark.parametrize("path", [{}, {"page_size": 7}, {"fixed": True}], ids=str)
def test_buffers_grow_with_the_text(pair, path, monkeypatch):
    """A limit costs nothing by itself, and growing changes no token."""
    target, draft = pair
    monkeypatch.setattr("beagle_sd.decoding.engine._FIRST_TOKENS", 8)
    options = {"max_new_tokens": 70, "temperature": 1.0, "return_logprobs": True}
    want = generate(target, draft, prompts(2), tree=TREE, **options)
    engine = Engine(target, draft, batch=2, capacity=10**6, tree=TREE, return_logprobs=True, **path)
    small = engine.nbytes
    assert small < 10**6
    del options["return_logprobs"]
    made = generate(target, draft, prompts(2), engine=engine, **options)
    assert torch.equal(made.sequences, want.sequences) and torch.equal(made.logprobs, want.logprobs)
    assert small < engine.nbytes < 40 * small
    kept = engine.nbytes
    generate(target, draft, prompts(2), engine=engine, **options)
    assert engine.nbytes == kept


@pytest.mark.parametrize("own", [True, False], ids=["its own engine", "an engine given"])
def test_out_of_memory_frees_the_buffers_and_leaves_all_usable(pair, own, monkeypatch):
    """Even while the error itself is kept, as notebooks do."""
    target, draft = pair
    engine = None if own else fixed_engine(target, draft, 2, 40, tree=TREE)
    kept = []

    def failing(wanted, draft, buffers, *rest):
        kept.append(weakref.ref(buffers))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr("beagle_sd.decoding.engine.play_round", failing)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            generate(target, draft, prompts(2), max_new_tokens=9, engine=engine, tree=None if engine else TREE)
    gc.collect()
    assert caught.value is not None and (kept[0]() is None) == own
    want = generate(target, None, prompts(2), max_new_tokens=9).sequences
    assert torch.equal(generate(target, draft, prompts(2), max_new_tokens=9, engine=engine).sequences, want)


def test_draft_and_buffers_add_less_than_5_percent_to_an_8b_target():
    """By count, in bf16 at 4096 tokens: what a graph keeps besides is measured on a GPU."""
    with torch.device("meta"):
        target = small_target(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=False,
        ).to(torch.bfloat16)
        draft = small_draft(target).to(torch.bfloat16)
    size = lambda model: sum(p.numel() * p.element_size() for p in model.parameters())  # noqa: E731
    assert size(target) == 2 * 8_030_261_248
    reduced_head = 16384 * 4096 * 2
    for batch in (1, 16):
        cache = 2 * 32 * 8 * 128 * 4096 * 2 * batch
        with torch.device("meta"):
            engine = fixed_engine(target, draft, batch, 4096, return_logprobs=True, tree=TreeShape(6, 10, 60))
            engine.buffers.reserve(4096, 4096)
        assert cache < engine.nbytes
        added = engine.nbytes - cache + size(draft) + reduced_head
        assert added < 0.05 * (size(target) + cache)
