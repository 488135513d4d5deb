from __future__ import annotations

import torch
from models import small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd.answers import encode_chat, write_answers


def prompts(count: int):
    return [(index, [{"role": "user", "content": "abc"[: 1 + index % 3] * (1 + index % 5)}]) for index in range(count)]


def test_greedy_answers_and_states_are_the_targets_own():
    model, tokenizer = small_target(), small_tokenizer()
    found = {s.index: s for s in write_answers(model, tokenizer, prompts(9), batch=4, max_new_tokens=12,
                                               temperatures=(0.0,))}  # fmt: skip
    assert sorted(found) == list(range(9)), "every prompt is answered once, also when it waited for a free row"
    for index, messages in prompts(9):
        ids = torch.tensor([encode_chat(tokenizer, messages)])
        truth = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id,
                               pad_token_id=0)[0].tolist()  # fmt: skip
        sequence = found[index]
        assert [*sequence.tokens.tolist(), sequence.final_token] == truth
        assert int(sequence.loss_mask.sum()) == len(truth) - ids.shape[1]
        with torch.no_grad():
            alone = model.model(sequence.tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(sequence.states.float(), alone, rtol=2e-2, atol=2e-2)


def test_temperatures_go_round_and_long_prompts_are_skipped():
    model, tokenizer = small_target(), small_tokenizer()
    many = [*prompts(4), (4, [{"role": "user", "content": "a" * 100}])]
    found = {s.index: s for s in write_answers(model, tokenizer, many, batch=2, max_new_tokens=6,
                                               max_prompt_tokens=60, temperatures=(0.0, 1.5))}  # fmt: skip
    assert sorted(found) == [0, 1, 2, 3]
    assert [found[index].temperature for index in range(4)] == [0.0, 1.5, 0.0, 1.5]


def test_sampled_answers_follow_the_softmax():
    model, tokenizer = small_target(initializer_range=0.05), small_tokenizer()
    same = [(index, [{"role": "user", "content": "a"}]) for index in range(600)]
    answers = write_answers(model, tokenizer, same, batch=200, max_new_tokens=1, temperatures=(1.0,))
    firsts = [sequence.final_token for sequence in answers]
    ids = torch.tensor([encode_chat(tokenizer, same[0][1])])
    with torch.no_grad():
        p = torch.softmax(model(ids).logits[0, -1], -1)
    counts = torch.bincount(torch.tensor(firsts), minlength=len(p)).double()
    order = p.argsort(descending=True)
    groups = torch.stack([part.sum() for part in counts[order].split(10)])
    expected = torch.stack([part.sum() for part in p[order].double().split(10)]) * len(firsts)
    chi2 = ((groups - expected) ** 2 / expected).sum()
    assert chi2 < 30, f"chi-square {chi2:.1f} with {len(groups) - 1} degrees of freedom"
