from __future__ import annotations

import pytest
import torch
from models import VOCAB, small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd import Engine, generate
from beagle_sd.data.answers import Request, longest_text, requests_of, seed_of, write_answers
from beagle_sd.data.conversations import encode_chat, encode_turns
from beagle_sd.models.ends import end_tokens
from bench.answers.kinds.tiny_targets import tiny_target

END = small_tokenizer().eos_token_id


def requests(count: int, temperatures=(0.0,)) -> list[Request]:
    tokenizer = small_tokenizer()
    texts = ["abc"[: 1 + index % 3] * (1 + index % 5) for index in range(count)]
    ids = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return list(requests_of(enumerate(ids), temperatures))


def answers(model, asked, **options) -> dict:
    found = list(write_answers(model, asked, ends=[END], **options))
    assert len(found) == len({s.index for s in found}), "a prompt is answered once, also when it waited for a free row"
    return {sequence.index: sequence for sequence in found}


def whole(sequence) -> list[int]:
    return [*sequence.tokens.tolist(), sequence.final_token]


def target_of(kind: str):
    return small_target() if kind == "llama" else tiny_target(kind)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_next"])
def test_greedy_answers_and_states_are_the_targets_own(kind):
    model, asked = target_of(kind), requests(9)
    found = answers(model, asked, batch=4, max_new_tokens=12)
    assert sorted(found) == list(range(9))
    for request in asked:
        ids = torch.tensor([request.ids])
        truth = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=END, pad_token_id=0)[0].tolist()
        sequence = found[request.index]
        assert whole(sequence) == truth
        assert int(sequence.loss_mask.sum()) == len(truth) - ids.shape[1]
        with torch.no_grad():
            alone = model.model(sequence.tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(sequence.states.float(), alone, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("longest", [1, 2, 7])
def test_sampled_answers_are_plain_decodings_with_their_seed(longest):
    model, asked = small_target(), requests(12, (0.7, 1.0))
    found = answers(model, asked, batch=5, max_new_tokens=longest, seed=3, states=False)
    for request in asked:
        plain = generate(
            model,
            None,
            torch.tensor([request.ids]),
            max_new_tokens=longest,
            eos_token_id=END,
            temperature=request.temperature,
            seed=torch.tensor([seed_of(3, request)]),
        )
        assert whole(found[request.index]) == plain.sequences[0].tolist()
        assert found[request.index].states.numel() == 0


def test_the_batch_and_the_order_change_nothing():
    model, asked = small_target(), requests(10, (0.0, 1.0))
    one = answers(model, asked, batch=3, max_new_tokens=9)
    other = answers(model, asked[::-1], batch=10, max_new_tokens=9)
    assert {index: whole(sequence) for index, sequence in one.items()} == {
        index: whole(sequence) for index, sequence in other.items()
    }


def test_temperatures_go_round():
    found = answers(small_target(), requests(4, (0.0, 1.5)), batch=2, max_new_tokens=6)
    assert [found[index].temperature for index in range(4)] == [0.0, 1.5, 0.0, 1.5]
    turned = requests_of([(0, [1]), (1, [1]), (2, [1])], (0.0, 0.7, 1.0), turn=1)
    assert [request.temperature for request in turned] == [0.7, 1.0, 0.0]
    assert len({seed_of(1, request) for request in requests(50, (0.0, 0.7))}) == 50


def test_long_prompts_are_answered_up_to_the_context(monkeypatch):
    """In rows of their own, so that short ones cost what they cost alone; prompt and answer fill the context at most,
    or what the model has positions for."""
    laid_out, made = [], Engine.__init__

    def seen(engine, *models, **sizes):
        laid_out.append((sizes["batch"], sizes["capacity"]))
        made(engine, *models, **sizes)

    monkeypatch.setattr(Engine, "__init__", seen)
    monkeypatch.setattr("beagle_sd.data.answers._PROMPT_TOKENS", 8)
    model = small_target(max_position_embeddings=100)
    lengths = (3, 60, 99, 8, 30, 100, 31, 95)
    asked = [Request(n, torch.arange(3, 3 + length).remainder(VOCAB).tolist(), 0.0) for n, length in enumerate(lengths)]
    found = {one.index: one for one in write_answers(model, asked, ends=(), batch=6, max_new_tokens=8, context=400)}
    assert sorted(found) == [0, 1, 2, 3, 4, 6, 7], "no position is left for an answer to the one of 100"
    assert laid_out == [(6, 16), (2, 40), (1, 72), (1, 100)]
    for request in asked:
        if request.index in found:
            new = min(8, 100 - len(request.ids))
            plain = generate(model, None, torch.tensor([request.ids]), max_new_tokens=new, eos_token_id=[])
            assert whole(found[request.index]) == plain.sequences[0].tolist()
    cut = [one.index for one in write_answers(model, asked, ends=(), max_new_tokens=2, context=31, states=False)]
    assert sorted(cut) == [0, 3, 4]


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["a list", "a tensor"])
def test_answers_end_where_the_targets_own_generate_ends(kind):
    """At any token that its generation config lists, and at the tokenizer's own."""
    model, tokenizer = small_target(), small_tokenizer()
    (request,) = requests(1)
    free = generate(model, None, torch.tensor([request.ids]), max_new_tokens=12, eos_token_id=[]).sequences[0].tolist()
    model.generation_config.eos_token_id = kind([96, free[len(request.ids) + 4]])
    ends = end_tokens(model, tokenizer)
    assert ends == [96, free[len(request.ids) + 4], tokenizer.eos_token_id]
    (found,) = write_answers(model, [request], ends=ends, max_new_tokens=12)
    assert whole(found) == model.generate(torch.tensor([request.ids]), max_new_tokens=12, pad_token_id=0)[0].tolist()
    assert whole(found) == generate(model, None, torch.tensor([request.ids]), max_new_tokens=12).sequences[0].tolist()
    assert len(whole(found)) <= len(request.ids) + 5 and found.final_token in ends


def test_sampled_answers_follow_the_softmax():
    model, first = small_target(initializer_range=0.05), requests(1)[0]
    same = [Request(index, first.ids, 1.0) for index in range(600)]
    firsts = [sequence.final_token for sequence in write_answers(model, same, ends=[END], batch=200, max_new_tokens=1)]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([first.ids])).logits[0, -1], -1)
    counts = torch.bincount(torch.tensor(firsts), minlength=len(p)).double()
    order = p.argsort(descending=True)
    groups = torch.stack([part.sum() for part in counts[order].split(10)])
    expected = torch.stack([part.sum() for part in p[order].double().split(10)]) * len(firsts)
    chi2 = ((groups - expected) ** 2 / expected).sum()
    assert chi2 < 30, f"chi-square {chi2:.1f} with {len(groups) - 1} degrees of freedom"


def test_a_model_without_finite_logits_is_named():
    model = small_target()
    model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="request 0: the target gave no finite logit"):
        answers(model, requests(1), max_new_tokens=3)


def test_texts_end_where_the_angles_of_longrope_change():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = small_target(rope_parameters=rope, max_position_embeddings=96)
    assert longest_text(model, 64) == 24 and longest_text(model, 20) == 20
    asked = requests(3)
    found = answers(model, asked, batch=3, max_new_tokens=60, states=False)
    assert max(len(whole(sequence)) for sequence in found.values()) <= 24


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="batch is 0; allowed: at least 1"):
        answers(small_target(), requests(1), batch=0)
    assert VOCAB > END


@pytest.mark.parametrize("longest", [5, 14])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_next"])
def test_every_turn_of_a_chat_is_answered_as_plain_decoding_does(kind, longest, monkeypatch):
    """Behind the keys of the turns before; answers alone are learnt, and an end of turn that they came to."""
    monkeypatch.setattr("beagle_sd.data.answers._PROMPT_TOKENS", 16)
    model, tokenizer = target_of(kind), small_tokenizer()
    chats = [["ab", "c", "abc" * 30], ["a"], ["b" * 9, "ca"]]
    asked = [encode_turns(tokenizer, [{"role": "user", "content": text} for text in chat]) for chat in chats]
    model.lm_head.weight.data[END] *= 3  # so that some answers come to their end
    requests = list(requests_of([(number, *turns) for number, turns in enumerate(asked)], (0.0, 1.0)))
    found = answers(model, requests, batch=2, max_new_tokens=longest, seed=5)
    ended = 0
    for request in requests:
        text, learnt = [], []
        for turn in (request.ids, *request.later):
            own_end = bool(text) and text[-1] == END
            text, learnt = text + turn[own_end:], learnt + [False] * len(turn[own_end:])
            plain = (
                generate(
                    model,
                    None,
                    torch.tensor([text]),
                    max_new_tokens=longest,
                    eos_token_id=END,
                    temperature=request.temperature,
                    seed=torch.tensor([seed_of(5, request)]),
                )
                .sequences[0]
                .tolist()
            )
            ended += plain[-1] == END
            text, learnt = plain, learnt + [True] * (len(plain) - len(text))
        sequence = found[request.index]
        assert whole(sequence) == text
        assert sequence.loss_mask.tolist() == learnt[1:]
        with torch.no_grad():
            alone = model.model(sequence.tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(sequence.states.float(), alone, rtol=2e-2, atol=2e-2)
    assert 0 < ended <= 6 and (longest > 5 or ended < 6)


def test_a_chat_ends_where_the_context_does():
    tokenizer = small_tokenizer()
    turns = encode_turns(tokenizer, [{"role": "user", "content": "ab"}] * 9)
    (found,) = write_answers(
        small_target(), requests_of([(0, *turns)]), ends=(), max_new_tokens=4, context=100, states=False
    )
    each = len(turns[1]) + 4
    assert len(whole(found)) == len(turns[0]) + 4 + (100 - len(turns[0]) - 4) // each * each
    assert int(found.loss_mask.sum()) == 4 * (1 + (100 - len(turns[0]) - 4) // each)
