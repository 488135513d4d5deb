"""What captured rounds on a GPU are asked for beside plain text: settings, copied branches, rows that take other
prompts, chats that go on, log-probabilities, guides' way over the host, targets of other kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from decoding_cases import NEW, assert_same_text, odd_one, prompts
from models import agreeable_target, small_draft
from round_cases import PATHS
from test_many import asked
from test_other_layers import FIRST, shape_of
from test_other_layers import prompts as prompts_of_kinds

from beagle_sd import Engine, Request, TreeShape, generate, generate_many
from bench.answers.kinds.tiny_targets import tiny_target

DEVICE = "cuda"
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

TREE = TreeShape(3, 2, 6)


@pytest.fixture(scope="module")
def pair():
    """Target and draft on the GPU, and the same target on the host."""
    host = agreeable_target()
    target = copy.deepcopy(host).to(DEVICE)
    return target, small_draft(target), host


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("drafting", [True, False], ids=["draft", "plain"])
def test_many_prompts_each_with_its_settings(pair, path, drafting):
    target, draft, host = pair
    cases = asked(13)
    requests = [Request(ids, key=number, **given) for number, (ids, given) in enumerate(cases)]
    own, tree = (draft, TREE) if drafting else (None, None)
    for answer in generate_many(target, own, requests, batch=4, tree=tree, capacity=60, **PATHS[path]):
        ids, given = cases[answer.request.key]
        want = generate(host, None, torch.tensor([ids]), **given).sequences[0, len(ids) :]
        assert answer.tokens.tolist() == want.tolist()


@pytest.mark.parametrize("path", PATHS)
def test_a_chat_goes_on_where_it_was(pair, path):
    target, draft, host = pair
    engine, text = Engine(target, draft, batch=1, capacity=120, tree=TREE, **PATHS[path]), prompts(1, 9)
    for turn in range(3):
        made = generate(target, draft, text.to(DEVICE), max_new_tokens=NEW // 2, engine=engine)
        assert_same_text(
            host, made.sequences.cpu(), generate(host, None, text, max_new_tokens=NEW // 2).sequences, text.shape[1]
        )
        assert made.report.prefilled <= (text.shape[1] if turn == 0 else 7)
        assert ("capture" in made.report.seconds) == (turn == 0)
        text = torch.cat([made.sequences.cpu(), prompts(1, 5, turn)], 1)


def test_branches_copied_from_the_text(pair):
    target, draft, host = pair
    ids = prompts(2, 6).repeat(1, 4)
    want = generate(host, None, ids, max_new_tokens=NEW).sequences
    for graph in (None, False):
        made = generate(target, draft, ids.to(DEVICE), max_new_tokens=NEW, tree=TreeShape(3, 4, 16, 12), graph=graph)
        assert_same_text(host, made.sequences.cpu(), want, ids.shape[1])


def test_processors_of_ones_own_act_on_the_host(pair):
    target, draft, host = pair
    asked_for = {"max_new_tokens": NEW, "logits_processor": [odd_one], "repetition_penalty": 1.2}
    want = generate(host, None, prompts(2), **asked_for).sequences
    made = generate(target, draft, prompts(2).to(DEVICE), tree=TREE, **asked_for)
    assert made.report.on_host and torch.equal(made.sequences.cpu(), want)


def test_log_probabilities(pair):
    target, draft, host = pair
    asked_for = {"max_new_tokens": NEW, "return_logprobs": True, "top_logprobs": 3, "prompt_logprobs": True}
    want = generate(host, None, prompts(2), **asked_for)
    made = generate(target, draft, prompts(2).to(DEVICE), tree=TREE, **asked_for)
    assert torch.equal(made.sequences.cpu(), want.sequences)
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        have, expected = getattr(made, name), getattr(want, name)
        pairs = zip(have, expected, strict=True) if isinstance(have, tuple) else [(have, expected)]
        for one, other in pairs:
            torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind, path",
    [
        pytest.param(kind, path, marks=[] if (kind in FIRST) == (path == "dense") else [pytest.mark.slow])
        for kind in (*FIRST, "gemma2", "lfm2", "mistral")
        for path in PATHS
    ],
)
def test_targets_of_other_kinds(kind, path):
    host, (ids, mask) = tiny_target(kind), prompts_of_kinds()
    target = copy.deepcopy(host).to(DEVICE)
    draft, shape = small_draft(target), shape_of(target)
    want = generate(host, None, ids, mask, max_new_tokens=NEW).sequences
    engine = Engine(target, draft, batch=3, capacity=ids.shape[1] + NEW, tree=shape, **PATHS[path])
    for _ in range(2):  # the second over what the first left
        made = generate(target, draft, ids.to(DEVICE), mask.to(DEVICE), max_new_tokens=NEW, engine=engine)
        assert_same_text(host, made.sequences.cpu(), want, ids.shape[1], mask=mask)
