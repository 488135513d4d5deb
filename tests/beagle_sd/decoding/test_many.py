"""Texts that leave their rows to others: each is what it would be alone, in whatever order it came."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import Recorder, prompts
from models import VOCAB, agreeable_target, small_draft

import beagle_sd.decoding.prompts as prompts_module
from beagle_sd import Engine, Request, TreeShape, generate, generate_many

TREE = TreeShape(3, 2, 6)


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


def arguments(number: int) -> dict:
    """Settings that differ from request to request."""
    kinds = [
        {},
        {"temperature": 1.0, "seed": 40 + number},
        {"temperature": 0.7, "top_p": 0.8, "seed": number},
        {"repetition_penalty": 1.3},
        {"logit_bias": {number % VOCAB: -float("inf"), 3: 1.0}, "no_repeat_ngram_size": 2},
        {"sequence_bias": {(4, 5): -3.0, (number % VOCAB,): 2.0}, "temperature": 1.2, "seed": 3},
    ]
    return {"max_new_tokens": 3 + number * 7 % 19, **kinds[number % len(kinds)]}


def asked(count: int) -> list[tuple[list[int], dict]]:
    return [(prompts(1, 1 + number * 5 % 17, seed=number)[0].tolist(), arguments(number)) for number in range(count)]


@pytest.mark.parametrize("way", [{}, {"graph": False, "page_size": 6}], ids=["dense", "pages"])
def test_every_text_is_what_generate_writes_alone_in_any_order(pair, way):
    target, draft = pair
    cases = asked(13)
    end = int(generate(target, None, torch.tensor([cases[0][0]]), max_new_tokens=3).sequences[0, -1])
    want = [
        generate(target, None, torch.tensor([ids]), eos_token_id=end, **given).sequences[0, len(ids) :].tolist()
        for ids, given in cases
    ]
    for order in (range(13), [5, 12, 0, 3, 8, 1, 2, 11, 4, 10, 9, 7, 6]):
        requests = [Request(cases[number][0], key=number, **cases[number][1]) for number in order]
        for own, batch in ((draft, 4), (draft, 1), (None, 3)):
            tree = TREE if own else None
            many = generate_many(target, own, requests, batch=batch, tree=tree, eos_token_id=end, **way)
            found = {answer.request.key: answer.tokens.tolist() for answer in many}
            assert found == dict(enumerate(want))
            assert many.report.new_tokens == sum(map(len, want))


def test_a_fixed_engine_admits_several_prompts_at_once(pair):
    """As a GPU does: prompts of about one length are run together beside the rows that go on."""
    target, draft = pair
    cases = asked(12)
    engine = Engine(target, draft, batch=5, capacity=40, tree=TREE, fixed=True, return_logprobs=True)
    requests = [Request(ids, key=number, **given) for number, (ids, given) in enumerate(cases)]
    for answer in generate_many(target, draft, requests, engine=engine):
        ids, given = cases[answer.request.key]
        want = generate(target, None, torch.tensor([ids]), return_logprobs=True, **given)
        assert answer.tokens.tolist() == want.sequences[0, len(ids) :].tolist()
        torch.testing.assert_close(answer.kept("logprobs")[len(ids) :], want.logprobs[0], atol=1e-4, rtol=0)


def test_prompts_that_begin_alike_are_run_together(pair, monkeypatch):
    """As chats of one system prompt do: what a row holds of them is not worth a run alone on a GPU. The longest prompts
    leave room for one token."""
    target, draft = pair
    engine, ran = Engine(target, draft, batch=4, capacity=13, tree=TREE, fixed=True), []
    real = prompts_module.run_prompts
    monkeypatch.setattr(prompts_module, "run_prompts", lambda *given: ran.append(len(given[4])) or real(*given))
    ids = [[5, 6, 7, *prompts(1, 5 + number % 5, seed=number)[0].tolist()] for number in range(20)]
    ids[0], news = [1, 2], [11] + [1] * 19  # the first goes on while the others take turns
    requests = [Request(one, key=number, max_new_tokens=news[number]) for number, one in enumerate(ids)]
    answers = list(generate_many(target, draft, requests, engine=engine))
    assert ran == [4, *[3] * 5, 1]
    for answer in answers:
        one, new = ids[answer.request.key], news[answer.request.key]
        want = generate(target, None, torch.tensor([one]), max_new_tokens=new).sequences[0, len(one) :]
        assert answer.tokens.tolist() == want.tolist()


def test_requests_come_as_they_are_asked_for_and_are_streamed(pair):
    target, draft = pair
    cases, drawn, recorders = asked(9), [], [Recorder() for _ in range(9)]

    def coming():
        for number, (ids, given) in enumerate(cases):
            drawn.append(number)
            yield Request(torch.tensor([ids]), key=number, streamer=recorders[number], **given)

    with pytest.raises(StopIteration):
        many = generate_many(target, draft, coming(), batch=2, capacity=40, tree=TREE)
        first = next(many)
        assert len(drawn) == 2, "no request is drawn before a row is free"
        answers = {first.request.key: first.tokens.tolist()}
        while True:
            answer = next(many)
            answers[answer.request.key] = answer.tokens.tolist()
    for number, recorder in enumerate(recorders):
        assert recorder.ended == 1 and recorder.runs[0] == cases[number][0]
        assert sum(recorder.runs[1:], []) == answers[number]


def test_a_chat_goes_on_in_the_row_that_holds_it(pair):
    target, draft = pair
    engine = Engine(target, draft, batch=2, capacity=100, tree=TREE)
    starts = [prompts(1, 30, seed=seed)[0].tolist() for seed in range(4)]
    many = generate_many(target, draft, [Request(ids, key=[*ids], max_new_tokens=6) for ids in starts], engine=engine)
    turns = 0
    for answer in many:
        text = answer.request.key + answer.tokens.tolist()
        want = generate(target, draft, torch.tensor([answer.request.key]), max_new_tokens=6).sequences[0].tolist()
        assert text == want
        if len(text) < 60:
            turns += 1
            many.add(Request([*text, 1, 2], key=[*text, 1, 2], max_new_tokens=6))
    assert turns == 4 * 3
    assert many.report.prefilled == 4 * 30 + turns * 3, "the last token of an answer and the new ones"


def test_criteria_and_end_tokens_of_a_request(pair):
    target, draft = pair
    stops = lambda text, scores, **_: torch.tensor([text.shape[1] >= 14])  # noqa: E731
    ids = prompts(1, 9)[0].tolist()
    requests = [Request(ids, key=number, stopping_criteria=[stops] * number, max_new_tokens=20) for number in (0, 1)]
    found = {one.request.key: one.tokens.tolist() for one in generate_many(target, draft, requests, tree=TREE)}
    assert len(found[0]) == 20 and found[1] == found[0][:5]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Request([]), "input_ids is \\[\\]; allowed: a list or tensor of one or more tokens"),
        (lambda: Request([3, 4.5]), "allowed: a list or tensor of one or more tokens"),
        (lambda: Request([3], max_new_tokens=0), "max_new_tokens is 0; allowed: at least 1"),
        (lambda: Request([3], temperature=-1.0), "temperature is -1.0"),
        (lambda: Request([VOCAB]), "input_ids has 97; allowed: 0 to 96"),
        (lambda: Request([3], repetition_penalty=0.0), "repetition_penalty is 0.0; allowed: above 0"),
    ],
)
def test_a_wrong_request_is_named_before_any_is_begun(pair, make, message):
    with pytest.raises(ValueError, match=message):
        generate_many(*pair, [Request([5]), make()])


def test_a_failing_call_ends_its_streamers(pair):
    """Whoever reads from one in another thread would wait for ever; an answer that was given is not ended twice."""
    recorders = [Recorder() for _ in range(3)]
    fails = lambda text, scores, **_: 1 / 0  # noqa: E731
    requests = [
        Request([3, 4, number], max_new_tokens=2 + 9 * number, streamer=recorders[number]) for number in range(2)
    ]
    requests.append(Request([5], streamer=recorders[2], stopping_criteria=[fails]))
    many = generate_many(*pair, requests, batch=2, tree=TREE)
    with pytest.raises(ZeroDivisionError):
        list(many)
    assert [recorder.ended for recorder in recorders] == [1, 1, 1]


def test_an_unknown_argument_is_named(pair):
    with pytest.raises(TypeError, match="Request\\(\\) got an unexpected keyword argument 'penalty'"):
        Request([3], penalty=2)
    with pytest.raises(TypeError, match="generate\\(\\) got an unexpected keyword argument 'penalty'"):
        generate(*pair, prompts(1), penalty=2)
