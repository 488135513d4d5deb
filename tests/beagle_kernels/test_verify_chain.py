"""verify_chain: the exact joint law over several rounds, both rules, odd rows."""

from __future__ import annotations

import pytest
import torch
from chain_cases import decode, draft_chain, filtered
from sampling_cases import chi_square_ok, mixed_sampling

from beagle_kernels import STATUS_BAD_TREE, STATUS_NAN, STATUS_NO_FINITE, Sampling, choose_tokens, verify_chain
from beagle_kernels.lossless import index_of, joint_law

RULES = ("token", "block")
INF = float("inf")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (1.0, 2)])
def test_joint_law_over_several_rounds(rule, temperature, top_k):
    """All 3^5 texts of 5 tokens, by rounds of up to 3 drafted tokens, against the Markov chain's own law."""
    rows, vocab, length = (15_000 if top_k else 60_000), 3, 5
    target, draft = torch.randn(vocab, vocab), torch.randn(vocab, vocab)
    sampling = Sampling.of(rows, torch.arange(rows) * 7919, temperature, top_k)
    text, rounds = decode(target, draft, 1, length, 3, sampling, rule)
    counts = torch.bincount(index_of(text, vocab), minlength=vocab**length)
    assert chi_square_ok(counts, joint_law(filtered(target, temperature, top_k), 1, length))
    assert 1.5 < rounds.double().mean() < length  # several rounds each, and some drafts accepted


@pytest.mark.parametrize("rule", RULES)
def test_seeds_in_a_row_and_one_seed_at_many_positions(rule):
    """The law of one round holds over positions under one seed too: what differs is only the position."""
    rows, vocab = 60_000, 4
    target, draft = torch.randn(vocab, vocab), torch.randn(vocab, vocab)
    sampling = Sampling.of(rows, torch.full((rows,), 5), 1.0)
    positions = torch.arange(rows) * 10
    tokens, draft_logits = draft_chain(draft, torch.zeros(rows, dtype=torch.long), 2, positions, sampling)
    target_logits = target[torch.cat((torch.zeros(rows, 1, dtype=torch.long), tokens), 1)]
    verdict = verify_chain(target_logits, draft_logits, tokens, positions, sampling, rule)
    first = torch.where(verdict.num_accepted > 0, tokens[:, 0], verdict.next_token)
    assert chi_square_ok(torch.bincount(first, minlength=vocab), filtered(target, 1.0)[0])


def test_block_accepts_more_than_token_and_both_what_theory_says():
    rows, vocab = 40_000, 4
    target, draft = torch.randn(vocab, vocab) * 1.5, torch.randn(vocab, vocab) * 1.5
    sampling, positions = Sampling.of(rows, torch.arange(rows), 1.0), torch.ones(rows, dtype=torch.long)
    tokens, draft_logits = draft_chain(draft, torch.zeros(rows, dtype=torch.long), 3, positions, sampling)
    target_logits = target[torch.cat((torch.zeros(rows, 1, dtype=torch.long), tokens), 1)]
    mean = {
        rule: verify_chain(target_logits, draft_logits, tokens, positions, sampling, rule).num_accepted.double().mean()
        for rule in RULES
    }
    p, q = filtered(target, 1.0), filtered(draft, 1.0)
    expected = {"token": 0.0, "block": 0.0}
    for chain in torch.cartesian_prod(*[torch.arange(vocab)] * 3).tolist():
        before = [0, *chain[:2]]
        chance = torch.stack([q[a, b] for a, b in zip(before, chain)]).prod()
        ratio = [(p[a, b] / q[a, b]).item() for a, b in zip(before, chain)]
        weight, token, alive, weights = 1.0, 0.0, 1.0, []
        for r in ratio:
            alive, weight = alive * min(r, 1.0), min(weight * r, 1.0)
            token += alive
            weights.append(weight)
        passes = []
        for w, last in zip(weights[:2], chain[:2]):
            surplus = (w * p[last] - q[last]).clamp(min=0).sum().item()
            passes.append(surplus / (surplus + 1 - w))
        passes.append(weights[2])
        block, missed = 0.0, 1.0
        for n in (3, 2, 1):
            block, missed = block + n * missed * passes[n - 1], missed * (1 - passes[n - 1])
        expected["token"] += float(chance * token)
        expected["block"] += float(chance * block)
    assert expected["block"] > expected["token"] + 0.02
    for rule in RULES:
        assert abs(mean[rule] - expected[rule]) < 4.5 * 1.5 / rows**0.5


@pytest.mark.parametrize("rule", RULES)
def test_greedy_accepts_the_argmax_chain(rule):
    target = torch.randn(40, 4, 30)
    best = target.argmax(2)
    tokens = best[:, :3].clone()
    wrong = torch.arange(40) % 4
    rows = (wrong < 3).nonzero()[:, 0]
    tokens[rows, wrong[rows]] = (tokens[rows, wrong[rows]] + 1) % 30
    draft = torch.nn.functional.one_hot(tokens, 30).float()
    verdict = verify_chain(target, draft, tokens, torch.arange(40), Sampling.of(40, 0, 0.0, 5, 0.5), rule)
    assert torch.equal(verdict.num_accepted, wrong.int())
    assert torch.equal(verdict.next_token, best.gather(1, wrong[:, None])[:, 0])
    for row in range(40):
        assert verdict.path[row].tolist() == [*range(wrong[row] + 1), *[-1] * (3 - int(wrong[row]))]


@pytest.mark.parametrize("rule", RULES)
def test_a_perfect_draft_is_always_accepted(rule):
    logits = torch.randn(500, 4, 20)
    sampling, positions = Sampling.of(500, 0, 1.0, 0, 0.9), torch.arange(500)
    tokens = torch.stack(
        [choose_tokens(logits[:, i], positions + i, sampling, stream=1, rounds=positions)[0] for i in range(3)], 1
    )
    verdict = verify_chain(logits, logits[:, :3], tokens, positions, sampling, rule)
    assert verdict.num_accepted.eq(3).all()


@pytest.mark.parametrize("rule", RULES)
def test_reduced_vocabulary_equals_the_full_one_with_the_rest_at_minus_infinity(rule):
    ids = torch.tensor([1, 3, 4, 8])
    target, reduced = torch.randn(200, 3, 10), torch.randn(200, 2, 4)
    full = torch.full((200, 2, 10), -INF).index_copy(2, ids, reduced)
    tokens, sampling = ids[torch.randint(4, (200, 2))], mixed_sampling(200)
    args = (tokens, torch.arange(200), sampling, rule)
    for have, want in zip(verify_chain(target, reduced, *args, token_ids=ids), verify_chain(target, full, *args)):
        assert torch.equal(have, want)


@pytest.mark.parametrize("rule", RULES)
def test_odd_rows(rule):
    target, draft = torch.zeros(5, 3, 6), torch.zeros(5, 2, 6)
    tokens = torch.ones(5, 2, dtype=torch.long)
    target[0, 1, 2] = float("nan")
    draft[1, 0, 2] = float("nan")
    target[2, 0] = -INF
    tokens[3, 1] = 6
    tokens[4, 0] = -1
    verdict = verify_chain(target, draft, tokens, torch.arange(5), Sampling.of(5, 0, 1.0), rule)
    assert verdict.status.tolist() == [STATUS_NAN, STATUS_NAN, STATUS_NO_FINITE, STATUS_BAD_TREE, STATUS_BAD_TREE]
    assert verdict.num_accepted[2:].eq(0).all() and verdict.next_token[2] == 0
    assert (verdict.next_token >= 0).all() and (verdict.next_token < 6).all()


def test_no_draft_tokens_is_plain_sampling_with_the_bonus_stream():
    target, sampling, positions = torch.randn(300, 1, 20), mixed_sampling(300), torch.arange(300)
    nothing = torch.empty(300, 0, dtype=torch.long)
    verdict = verify_chain(target, torch.empty(300, 0, 20), nothing, positions, sampling)
    want, _ = choose_tokens(target[:, 0], positions, sampling, stream=3, rounds=positions)
    assert torch.equal(verdict.next_token, want) and verdict.path.eq(0).all()


def test_bad_input():
    target, draft, tokens = torch.randn(2, 4, 9), torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.long)
    positions, sampling = torch.arange(2), Sampling.of(2)
    for arguments, error in [
        ((target[:, :3], draft, tokens, positions, sampling), ValueError),
        ((target, draft[..., :5], tokens, positions, sampling), ValueError),
        ((target, draft, tokens.int(), positions, sampling), TypeError),
        ((target.double(), draft, tokens, positions, sampling), TypeError),
        ((target, draft, tokens, positions, Sampling.of(3)), ValueError),
        ((target, draft, tokens, positions, sampling, "typical"), ValueError),
    ]:
        with pytest.raises(error, match="verify_chain: .*allowed"):
            verify_chain(*arguments)


def test_opcheck_and_compile():
    target, draft, tokens = torch.randn(4, 4, 9), torch.randn(4, 3, 9), torch.randint(9, (4, 3))
    positions, sampling = torch.arange(4), mixed_sampling(4)
    for rule in RULES:
        args = (target, draft, tokens, positions, *sampling, rule, None, "reference")
        torch.library.opcheck(torch.ops.beagle.verify_chain, args)
        compiled = torch.compile(verify_chain, fullgraph=True, backend="aot_eager")
        for have, want in zip(
            compiled(target, draft, tokens, positions, sampling, rule),
            verify_chain(target, draft, tokens, positions, sampling, rule),
        ):
            assert torch.equal(have, want)
