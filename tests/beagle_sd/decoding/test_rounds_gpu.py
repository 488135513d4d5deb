"""Rounds on a GPU: captured and eager give the same text, none waits for the host, errors leave all usable."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from decoding_cases import Recorder, assert_same_text, prompts
from models import agreeable_target, small_draft, small_target
from round_cases import PATHS, TREE, begin, rows, texts
from test_rounds import RULES

from beagle_kernels import Sampling
from beagle_sd import AdaptiveTree, Engine, GraphError, generate
from beagle_sd.decoding.rounds import play_round
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import RMSNorm

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

NEW = 24


@pytest.fixture(scope="module")
def pair():
    """Target and draft on the GPU, and the same target on the host."""
    host = agreeable_target()
    target = copy.deepcopy(host).cuda()
    return target, small_draft(target), host


def on_gpu(target, draft, ids, mask=None, **settings):
    return generate(target, draft, ids.cuda(), None if mask is None else mask.cuda(), max_new_tokens=NEW, **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 5])
def test_captured_equals_eager_and_the_host(pair, path, temperature, batch):
    target, draft, host = pair
    ids, mask = rows(batch)
    want = generate(host, None, ids, mask, max_new_tokens=NEW, temperature=temperature).sequences
    for own, tree in ((None, None), (draft, TREE), (draft, TreeShape(6, 10, 60))):
        settings = {"temperature": temperature, **PATHS[path], "tree": tree}
        captured = on_gpu(target, own, ids, mask, **settings)
        eager = on_gpu(target, own, ids, mask, graph=False, **settings)
        assert torch.equal(captured.sequences, eager.sequences)
        assert set(captured.report.seconds) == {"prefill", "capture", "rounds"}
        assert set(eager.report.seconds) == {"prefill", "draft", "target", "verify", "keep"}
        assert captured.report.reached == eager.report.reached
        assert_same_text(host, captured.sequences.cpu(), want, 11, Sampling.of(batch, 0, temperature), mask)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tree", [TREE, TreeShape(3, 4, 16, 12), None], ids=["tree", "copied", "plain"])
@pytest.mark.parametrize("rules", [None, RULES], ids=["free", "rules"])
def test_a_round_never_waits_for_the_host(pair, path, tree, rules):
    target, draft, _ = pair
    engine = Engine(
        target,
        draft if tree else None,
        batch=2,
        capacity=40,
        return_logprobs=True,
        top_logprobs=3,
        graph=False,
        **PATHS[path],
        tree=tree or TREE,
    )
    with torch.inference_mode():
        begin(engine, texts(prompts(2), (11, 4), 20, Sampling.of(2), rules), [])
        given = engine.target, engine.draft, engine.buffers, engine.shape, engine._shaping()
        play_round(*given)  # compiles what it needs
        torch.cuda.set_sync_debug_mode("error")
        try:
            play_round(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(engine.buffers.emitted.min()) >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_drafts_norm_is_wide_inside(dtype):
    norm = RMSNorm(4096, 1e-5).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = 30 * torch.randn(64, 4096, device="cuda", dtype=dtype)
    want = torch.nn.functional.rms_norm(x.double(), (4096,), norm.weight.double(), 1e-5)
    assert ((norm(x).double() - want).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * want.abs() + 1e-6).all()


def test_an_engine_captures_once_and_serves_other_texts(pair):
    target, draft, _ = pair
    engine = Engine(target, draft, batch=2, capacity=60, tree=TREE)
    for seed, temperature in ((5, 0.0), (6, 1.0), (7, 0.7)):
        ids = prompts(2, 5 + seed, seed)
        made = on_gpu(target, draft, ids, engine=engine, temperature=temperature, seed=seed)
        want = on_gpu(target, draft, ids, graph=False, temperature=temperature, seed=seed, tree=TREE)
        assert torch.equal(made.sequences, want.sequences)
        assert ("capture" in made.report.seconds) == (seed == 5)


def test_an_engine_has_graphs_with_and_without_a_bias(pair):
    target, draft, _ = pair
    engine, ids = Engine(target, draft, batch=2, capacity=60, tree=TREE), prompts(2)
    free = on_gpu(target, draft, ids, graph=False, tree=TREE).sequences
    for token, captures in ((None, True), (int(free[0, 14]), True), (None, False), (int(free[1, 14]), False)):
        bias = {} if token is None else {"logit_bias": {token: -torch.inf}, "min_new_tokens": 9, "eos_token_id": [3]}
        made = on_gpu(target, draft, ids, engine=engine, **bias)
        want = on_gpu(target, draft, ids, graph=False, tree=TREE, **bias)
        assert torch.equal(made.sequences, want.sequences) and ("capture" in made.report.seconds) == captures
        assert token is None or not (made.sequences[:, 11:] == token).any()


def test_ends_streamers_criteria_and_adaptive_trees(pair):
    target, draft, _ = pair
    ids = prompts(3)
    free = on_gpu(target, draft, ids, graph=False, tree=TREE).sequences
    ends = free[:, 22].tolist()
    for more in ({"eos_token_id": ends}, {"stopping_criteria": [lambda text, _: text[:, -1] == ends[0]]}):
        want = on_gpu(target, draft, ids, graph=False, tree=TREE, **more)
        made = on_gpu(target, draft, ids, tree=TREE, **more)
        assert torch.equal(made.sequences, want.sequences)
    seen = Recorder()
    made = on_gpu(target, draft, ids[:1], streamer=seen, tree=TREE)
    assert [token for run in seen.runs for token in run] == made.sequences[0].tolist()
    shapes = {TreeShape(2, 1, 3): 2.0, TreeShape(4, 4, 16): 3.0}
    tree = AdaptiveTree(Costs({1: 1.0, 3: 1.1, 16: 1.2}, dict.fromkeys(shapes, 0.1)), shapes, probe=2)
    assert torch.equal(on_gpu(target, draft, ids, tree=tree).sequences, free)


def test_what_cannot_be_captured_says_why_and_decodes_eagerly_if_asked(pair):
    target, draft, _ = pair
    ids = prompts(1)
    want = on_gpu(target, draft, ids, tree=TREE).sequences
    reads = lambda module, args: (args[0] + 0 * args[0].sum().item(),)  # noqa: E731
    hook = target.model.layers[1].mlp.register_forward_pre_hook(reads)
    try:
        with pytest.raises(GraphError, match="cannot be captured as a CUDA graph: .*captur.*allowed: graph=False"):
            on_gpu(target, draft, ids, tree=TREE)
        assert torch.equal(on_gpu(target, draft, ids, graph=False, tree=TREE).sequences, want)
    finally:
        hook.remove()
    assert torch.equal(on_gpu(target, draft, ids, tree=TREE).sequences, want)


def test_an_engine_whose_capture_failed_tries_again(pair):
    """On the stream that was current, with random numbers and memory to be had in between."""
    target, draft, _ = pair
    ids = prompts(1)
    want = on_gpu(target, draft, ids, graph=False, tree=TREE).sequences
    engine = Engine(target, draft, batch=1, capacity=ids.shape[1] + NEW, tree=TREE)
    reads = lambda module, args: (args[0] + 0 * args[0].sum().item(),)  # noqa: E731
    hook = target.model.layers[1].mlp.register_forward_pre_hook(reads)
    try:
        with pytest.raises(GraphError, match="allowed: graph=False"):
            on_gpu(target, draft, ids, engine=engine)
    finally:
        hook.remove()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(1000, device="cuda").std() > 0.5
    assert torch.equal(on_gpu(target, draft, ids, engine=engine).sequences, want)


def test_out_of_memory_leaves_the_process_usable(pair):
    target, draft, _ = pair
    ids = prompts(1)
    want = on_gpu(target, draft, ids, tree=TREE).sequences
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        generate(target, draft, ids.cuda(), max_new_tokens=2 * 10**9, tree=TREE)
    assert caught.value is not None and torch.cuda.memory_allocated() == before
    assert torch.equal(on_gpu(target, draft, ids, tree=TREE).sequences, want)


def test_draft_buffers_and_graph_add_less_than_5_percent_to_an_8b_target():
    """Measured: what the process has reserved beside the target's weights and cache, graph included."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]  # other processes of the same run have their part of the device
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            target = small_target(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=False,
                max_position_embeddings=8192,
            )
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()  # more than the weights: the allocator rounds each up
            draft = small_draft(target, draft_vocab=torch.arange(0, 128256, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    engine = Engine(target, draft, batch=1, capacity=4096, tree=TreeShape(6, 10, 60))
    generate(target, draft, torch.randint(128256, (1, 500), device="cuda"), max_new_tokens=16, engine=engine)
    torch.cuda.empty_cache()
    weights, cache = (
        sum(p.nbytes for p in target.parameters()),
        sum(states.nbytes for states in engine.buffers.cache.states),
    )
    assert torch.cuda.memory_reserved() - before - cache < 0.05 * (weights + cache)
