"""A round as a CUDA graph would run it, proven without one: fixed buffers, no host reads, no Python value baked in."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from decoding_cases import assert_same_text, prompts
from models import VOCAB, agreeable_target, small_draft
from round_cases import PATHS, TREE, begin, begun, decoded, fixed_engine, rows, texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from beagle_kernels import Sampling
from beagle_sd import AdaptiveTree, generate
from beagle_sd.decoding.rounds import play_round
from beagle_sd.decoding.settings.rules import Rules
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import TreeShape


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "batch,settings",
    [
        (1, {}),
        (16, {}),
        (3, {"temperature": 0.7}),
        (5, {"temperature": 1.0, "top_p": 0.9}),
        (2, {"temperature": 1.5, "top_k": 20, "min_p": 0.05}),
    ],
    ids=str,
)
def test_every_path_gives_the_text_of_plain_decoding(pair, path, batch, settings):
    target, draft = pair
    ids, mask = rows(batch)
    settings = {"max_new_tokens": 20, "seed": 7, **settings}
    free = generate(target, None, ids, mask, **settings).sequences
    settings["eos_token_id"] = int(free[0, 19])  # ends the first row after 9 tokens at most, others at random
    want = generate(target, None, ids, mask, **settings).sequences
    for own, tree in ((None, None), (draft, TREE), (draft, TreeShape(5, 8, 100))):
        engine = fixed_engine(target, own, batch, 31, **PATHS[path], tree=tree)
        for _ in range(2):  # buffers that held another text serve the next
            made = generate(target, own, ids, mask, engine=engine, **settings)
            assert torch.equal(made.sequences, want)
    assert made.report.tokens_per_round > 1.2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_words_see_what_the_4d_mask_shows(pair, backend, monkeypatch):
    """Prompts of several chunks, the last of them ragged, then a tree: hidden states by either path."""
    target, draft = pair
    ids, mask = rows(3, 150)
    monkeypatch.setattr("beagle_sd.models.target.AT_ONCE", 70)
    op = __import__("beagle_kernels").tree_attention
    monkeypatch.setattr(
        "beagle_sd.models.layers.attention.tree_attention", lambda *args, **more: op(*args, backend=backend, **more)
    )
    want = generate(target, draft, ids, mask, max_new_tokens=12, tree=TREE).sequences
    for pages in (None, 16):
        engine = fixed_engine(target, draft, 3, 162, page_size=pages, tree=TREE)
        assert torch.equal(generate(target, draft, ids, mask, max_new_tokens=12, engine=engine).sequences, want)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_of_4096_tokens(path):
    target = agreeable_target(max_position_embeddings=8192)
    draft, ids = small_draft(target), prompts(1, 4096)
    want = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    engine = fixed_engine(target, draft, 1, 4108, **PATHS[path], tree=TREE)
    assert_same_text(target, generate(target, draft, ids, max_new_tokens=12, engine=engine).sequences, want, 4096)


@torch.inference_mode()
def test_buffers_stay_where_they_are(pair):
    target, draft = pair
    engine = begun(target, draft, page_size=7, return_logprobs=True, tree=TREE)
    places = {name: tensor.data_ptr() for name, tensor in engine.buffers.tensors().items()}
    assert {"states_0", "lengths", "table_0", "draft_keys", "text", "logprobs", "news", "seed"} <= set(places)
    for _ in range(3):
        play_round(engine.target, draft, engine.buffers, engine.shape)
    begin(engine, texts(prompts(3, 5), (5, 2, 3), 4, Sampling.of(3)), [])
    assert {name: tensor.data_ptr() for name, tensor in engine.buffers.tensors().items()} == places


class Tape(TorchDispatchMode):
    """Records every operator with its arguments and plays them again on what the buffers then hold: as a CUDA graph
    does, with every Python number as it was."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        fresh: dict[int, torch.Tensor] = {}

        def now(value):
            return fresh.get(id(value), value)

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    fresh[id(old)] = new


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("drafting", ["draft", "window", "plain"])
def test_a_recorded_round_replays_as_any_later_one(pair, path, drafting):
    """Recorded while the rows rest, as a graph is captured; then replayed over other lengths and tokens, to the end."""
    target, draft = pair
    if drafting != "draft":
        draft = small_draft(target, window_keys=9) if drafting == "window" else None
    settings = {**PATHS[path], "tree": TREE, "return_logprobs": True}
    settings["rules"] = RULES if path == "pages" else None
    with torch.no_grad():
        ours, theirs = (begun(target, draft, tokens=40, **settings) for _ in range(2))
        with ours.buffers.at_rest(), Tape() as tape:
            play_round(ours.target, draft, ours.buffers, ours.shape, ours.shaping)
        rounds = 0
        while bool(theirs.buffers.live.any()):
            tape.replay()
            play_round(theirs.target, draft, theirs.buffers, theirs.shape, theirs.shaping)
            assert torch.equal(ours.buffers.news, theirs.buffers.news)
            rounds += 1
        for name, tensor in theirs.buffers.tensors().items():
            assert torch.equal(ours.buffers.tensors()[name], tensor), name
    assert int(ours.buffers.emitted.sum()) > 3 + rounds and rounds > 3


RULES = Rules(
    added={7: -torch.inf, 8: 3.0},
    phrases={(4, 5): -torch.inf, (8, 8, 1): 2.0},
    repetition=1.2,
    frequency=0.3,
    presence=0.1,
    first={5: 9},
    ngram=3,
)


class TapeGraph:
    """Stands in for RoundGraph where there is no CUDA."""

    captured = 0

    def __init__(self, play, device, pool):
        self.pool = pool
        play()
        with Tape() as self.tape:
            play()
        TapeGraph.captured += 1

    def replay(self) -> None:
        self.tape.replay()


def without_cuda(monkeypatch) -> None:
    monkeypatch.setattr("beagle_sd.decoding.engine.RoundGraph", TapeGraph)
    handles = itertools.count()
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, next(handles)))


def test_graphs_share_a_pool_while_there_are_any(pair, monkeypatch):
    """The pool of graphs that are all gone is not used again: a tensor that lies in it keeps it from being emptied."""
    target, draft = pair
    without_cuda(monkeypatch)
    engine, pools = fixed_engine(target, draft, 1, 40, tree=TREE), []
    engine.graph = True
    for rules in ({"frequency_penalty": 0.5}, {"logit_bias": {3: 1.0}}, {}, {"logit_bias": {4: 1.0, 5: 1.0}}):
        generate(target, draft, prompts(1), max_new_tokens=5, engine=engine, **rules)
        pools.append([graph.pool for graph in (*engine._graphs.values(), *engine._shaped_graphs.values())])
    assert pools == [[(0, 0)], [(0, 1)], [(0, 1)] * 2, [(0, 1)] * 2]


def test_a_captured_head_lives_as_long_as_its_graph(pair, monkeypatch):
    """Though another call bind the draft anew in between."""
    target, _ = pair
    without_cuda(monkeypatch)
    monkeypatch.setattr(TapeGraph, "__init__", lambda self, play, device, pool: setattr(self, "replay", play))
    monkeypatch.setattr("beagle_sd.models.draft.BeagleDraft._is_head_of", lambda self, target: False)  # as on a GPU
    draft = small_draft(target, draft_vocab=torch.arange(0, VOCAB, 2))
    engine = fixed_engine(target, draft, 1, 40, tree=TREE)
    engine.graph = True
    generate(target, draft, prompts(1), max_new_tokens=5)
    captured = weakref.ref(draft.head)
    generate(target, draft, prompts(1), max_new_tokens=5, engine=engine)
    generate(target, draft, prompts(1), max_new_tokens=5)
    assert captured() is not draft.head and captured() is not None


def test_generate_by_replays_alone(pair, monkeypatch):
    """The way of a GPU from end to end: one capture a shape, and one with a bias, serving texts of other lengths, ends
    and settings."""
    target, draft = pair
    without_cuda(monkeypatch)
    shapes = {TreeShape(2, 1, 3): 2.0, TreeShape(4, 4, 16): 3.0}
    tree = AdaptiveTree(Costs({1: 1.0, 3: 1.1, 16: 1.2}, dict.fromkeys(shapes, 0.1)), shapes, probe=2)
    for own, options, most in ((draft, {"tree": TREE}, 1), (None, {}, 1), (draft, {"tree": tree, "page_size": 4}, 3)):
        engine = fixed_engine(target, own, 2, 40, **options)
        engine.graph, TapeGraph.captured = True, 0
        for seed, temperature, new in ((5, 0.0, 22), (6, 1.0, 9), (7, 0.7, 15), (8, 0.0, 15)):
            ids, settings = prompts(2, 5 + seed, seed), {"max_new_tokens": new, "temperature": temperature}
            free = generate(target, None, ids, **settings).sequences
            settings["eos_token_id"] = int(free[1, -new // 3])
            if seed % 2 == 0:
                settings |= {"logit_bias": {int(free[0, -new // 2]): -torch.inf}, "min_new_tokens": 7}
                settings |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[4, 5], [8, 8, 1]]}
            want = generate(target, None, ids, **settings)
            made = generate(target, own, ids, engine=engine, **settings)
            assert torch.equal(made.sequences, want.sequences)
            assert set(made.report.seconds) - {"capture"} == {"prefill", "rounds"}
        assert 2 <= TapeGraph.captured <= 2 * most


@torch.inference_mode()
def test_rows_at_rest_keep_their_text(pair):
    """What warming up before a capture relies on, and a round begun after the last row has ended."""
    target, draft = pair
    engine = begun(target, draft, tree=TREE)
    play_round(engine.target, draft, engine.buffers, engine.shape)
    buffers = engine.buffers
    lengths = buffers.cache.lengths.tolist()

    def kept():
        return [
            part.clone()
            for row, length in enumerate(lengths)
            for part in (
                *(states[:, :, row, :, :length] for states in buffers.cache.states),
                buffers.draft_cache.keys[row, :, :length],
                buffers.text[row, : buffers.prompts[row] + buffers.emitted[row]],
                buffers.emitted,
                buffers.live,
                buffers.pending,
                buffers.cache.lengths,
            )
        ]

    before = kept()
    with buffers.at_rest():
        for _ in range(3):
            play_round(engine.target, draft, buffers, engine.shape)
    assert all(map(torch.equal, kept(), before))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_host_may_lag_a_round_behind(pair, temperature):
    """As with graphs: a round is begun before the last one's news is read; the text and the counts stay the same."""
    target, draft = pair
    ids = prompts(4)
    free = generate(target, draft, ids, max_new_tokens=30, temperature=temperature, tree=TREE).sequences
    for ends in ([], [int(free[0, 20])], free[:, 30].tolist()):
        settings = {"max_new_tokens": 30, "temperature": temperature, "eos_token_id": ends, "pad_token_id": 0}
        want = generate(target, draft, ids, **settings, tree=TREE)
        engine = fixed_engine(target, draft, 4, 41, tree=TREE)
        with torch.inference_mode():
            given = texts(ids, [11] * 4, 30, Sampling.of(4, 0, temperature))
            decoding, written = decoded(engine, given, ends, ahead=True)
            assert decoding._most_playing == 2
        longest = want.sequences.shape[1] - 11
        padded = [row.tokens + [0] * (longest - len(row.tokens)) for row in written]
        assert padded == want.sequences[:, 11:].tolist()
        ours, theirs = decoding.report(), want.report
        ours.seconds = theirs.seconds = {}
        assert ours == theirs


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 3}], ids=str)
def test_logprobs_are_those_of_scoring_the_text(pair, settings):
    target, draft = pair
    ids, mask = rows(3)
    free = generate(target, draft, ids, mask, max_new_tokens=18, **settings, tree=TREE)
    assert free.logprobs is None
    ends = [int(free.sequences[1, 20])]
    for paged in (None, 4):
        made = generate(
            target,
            draft,
            ids,
            mask,
            max_new_tokens=18,
            eos_token_id=ends,
            pad_token_id=0,
            return_logprobs=True,
            page_size=paged,
            **settings,
            tree=TREE,
        )
        assert made.logprobs.shape == (3, made.sequences.shape[1] - 11) and made.logprobs.dtype == torch.float32
        for row in range(3):
            new = made.sequences[row, 11:].tolist()
            count = new.index(ends[0]) + 1 if ends[0] in new else len(new)
            text = torch.cat((ids[row][mask[row].bool()], made.sequences[row, 11 : 11 + count]))[None]
            with torch.no_grad():
                want = target(text).logits[0].log_softmax(-1)[-count - 1 : -1].gather(1, text[0, -count:, None])[:, 0]
            torch.testing.assert_close(made.logprobs[row, :count], want, rtol=1e-4, atol=1e-4)
            assert not made.logprobs[row, count:].any()


def test_a_tree_that_adapts_takes_its_shape_a_round(pair):
    target, draft = pair
    shapes = {TreeShape(2, 1, 3): 2.0, TreeShape(4, 4, 16): 3.0}
    costs = Costs({1: 1.0, 3: 1.1, 16: 1.2}, dict.fromkeys(shapes, 0.1))
    ids = prompts(2)
    want = generate(target, None, ids, max_new_tokens=24, temperature=1.0).sequences
    engine = fixed_engine(target, draft, 2, 35, tree=AdaptiveTree(costs, shapes, probe=2))
    made = generate(target, draft, ids, max_new_tokens=24, temperature=1.0, engine=engine)
    assert torch.equal(made.sequences, want) and made.report.rounds < 23
