"""An engine prefills of a prompt only what it does not hold: the text is that of an engine that held nothing."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import prompts
from models import agreeable_target, small_draft

from beagle_sd import Engine, TreeShape, generate

TREE = TreeShape(3, 2, 6)
PATHS = {"dense": {}, "fixed": {"fixed": True}, "pages": {"page_size": 7}, "a graph's": {"fixed": True, "page_size": 5}}


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


def rows_of(*texts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_a_chat_s_later_turns_prefill_what_is_new(pair, path, settings):
    target, draft = pair
    settings = {"max_new_tokens": 9, **settings}
    for own in (draft, None):
        engine = Engine(target, own, batch=2, capacity=120, tree=TREE, **PATHS[path])
        chats = [prompts(1, 11)[0].tolist(), prompts(1, 5, seed=6)[0].tolist()]
        held = 0
        for turn in range(4):
            ids, mask = rows_of(*chats)
            want = generate(target, own, ids, mask, tree=TREE if own else None, **settings)
            made = generate(target, own, ids, mask, engine=engine, **settings)
            assert torch.equal(made.sequences, want.sequences)
            assert made.report.prefilled == sum(map(len, chats)) - held
            answers = [made.sequences[row, ids.shape[1] :].tolist() for row in range(2)]
            held = sum(len(chat) + len(answer) - 1 for chat, answer in zip(chats, answers, strict=True))
            chats = [[*chat, *answer, turn + 1, 2, 3 + row] for row, (chat, answer) in enumerate(zip(chats, answers))]


def test_what_parts_early_is_run_from_there_and_rows_find_their_texts(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=3, capacity=60, tree=TREE)
    first = [prompts(1, 20, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    generate(target, draft, *rows_of(*first), max_new_tokens=8, engine=engine)
    again = [first[2][:15] + [5, 6], first[0], first[1][:1] + [8] * 30]  # in another order
    ids, mask = rows_of(*again)
    made = generate(target, draft, ids, mask, max_new_tokens=8, engine=engine)
    assert torch.equal(made.sequences, generate(target, draft, ids, mask, max_new_tokens=8).sequences)
    assert made.report.prefilled == 2 + 1 + 30, "the last token of a prompt is always run"
    engine.forget()
    assert generate(target, draft, ids, mask, max_new_tokens=8, engine=engine).report.prefilled == 17 + 20 + 31


@pytest.mark.parametrize("window", [1, 4, 30])
def test_a_draft_s_window_is_run_anew_where_its_ring_was_written_over(window):
    target = agreeable_target()
    draft = small_draft(target, window_keys=window)
    engine = Engine(target, draft, batch=1, capacity=90, tree=TREE)
    ids = prompts(1, 30)
    for cut, prefilled in ((None, 30), (20, min(23, 3 + window)), (None, 0)):
        ids = ids if cut is None else torch.cat([ids[:, :cut], torch.tensor([[1, 2, 3]])], 1)
        want = generate(target, draft, ids, max_new_tokens=12, tree=TREE, return_logprobs=True)
        made = generate(target, draft, ids, max_new_tokens=12, engine=engine)
        assert torch.equal(made.sequences, want.sequences)
        assert made.report.tokens_per_round == want.report.tokens_per_round, "the draft sees what it would have seen"
        if cut is not None:
            assert made.report.prefilled == prefilled
        ids = torch.cat([made.sequences, torch.tensor([[7, 8]])], 1)


def test_after_a_call_that_was_broken_off_all_is_run(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=1, capacity=60, tree=TREE)
    ids = prompts(1, 20)

    class Broken(Exception):
        pass

    def breaking(*_):
        raise Broken

    own = engine._round
    engine._round = breaking  # type: ignore[method-assign]
    with pytest.raises(Broken):
        generate(target, draft, ids, max_new_tokens=8, engine=engine)
    engine._round = own  # type: ignore[method-assign]
    made = generate(target, draft, ids, max_new_tokens=8, engine=engine)
    assert made.report.prefilled == 20
    assert torch.equal(made.sequences, generate(target, draft, ids, max_new_tokens=8).sequences)


def test_a_criterion_that_cuts_an_answer_leaves_what_may_be_reused(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=1, capacity=60, tree=TREE)
    ids = prompts(1, 20)
    stop = [lambda text, scores, **_: torch.tensor([text.shape[1] >= 23])]
    made = generate(target, draft, ids, max_new_tokens=20, engine=engine, stopping_criteria=stop)
    assert made.sequences.shape[1] == 23
    longer = torch.cat([made.sequences, torch.tensor([[1, 2]])], 1)
    again = generate(target, draft, longer, max_new_tokens=8, engine=engine)
    assert torch.equal(again.sequences, generate(target, draft, longer, max_new_tokens=8).sequences)
    assert again.report.prefilled <= 3


def test_fewer_rows_than_the_engine_has(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=3, capacity=60, tree=TREE)
    ids = prompts(2, 9)
    for _ in range(2):
        made = generate(target, draft, ids, max_new_tokens=8, engine=engine)
        assert torch.equal(made.sequences, generate(target, draft, ids, max_new_tokens=8).sequences)
    with pytest.raises(ValueError, match="4 rows were given to an engine for 3, of which 3 are free; allowed: as many"):
        generate(target, draft, prompts(4), max_new_tokens=8, engine=engine)
