"""choose_tokens: definition, distribution, filters, odd rows, and agreement of backends."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import chi_square_ok, filtered_softmax, mixed_sampling, wrong_rows

from beagle_kernels import STATUS_NAN, STATUS_NO_FINITE, Sampling, choose_tokens
from beagle_kernels.reference.philox import gumbel
from beagle_kernels.reference.sampling import filter_cut, fixed_point

INF = float("inf")


def test_greedy_is_argmax_with_the_lowest_id_on_ties():
    logits = torch.randint(-3, 3, (64, 37)).float()
    tokens, status = choose_tokens(logits, torch.arange(64), Sampling.of(64))
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(tokens, first) and not status.any()


def test_noise_is_that_of_the_position_and_seed():
    logits, sampling = torch.randn(5, 100), Sampling.of(5, seed=9, temperature=0.7)
    positions = torch.tensor([0, 3, 3, 2**31, 5])
    want = (logits + sampling.temperature[:, None] * gumbel(sampling.seed, positions, 100)).argmax(1)
    assert torch.equal(choose_tokens(logits, positions, sampling)[0], want)


@pytest.mark.parametrize(
    "settings",
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 4, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.15),
        (1.0, 8, 0.7, 0.1),
    ],
)
def test_distribution(settings):
    n, vocab = 40_000, 23
    z = torch.randn(vocab) * 1.5
    sampling = Sampling.of(n, torch.full((n,), 77), *settings)
    tokens, _ = choose_tokens(z.expand(n, -1), torch.arange(n), sampling)
    assert chi_square_ok(torch.bincount(tokens, minlength=vocab), filtered_softmax(z, *settings))


@pytest.mark.parametrize("vocab", [2, 3, 64, 65, 300, 1000])
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.0, 40, 1.0, 0.0)])
def test_distribution_over_groups(vocab, settings):
    """Vocabularies below, at and above a group of ids, and over several: each token as often as the law says."""
    n = 30_000
    z = torch.randn(vocab)
    seeds, positions = torch.arange(n), torch.arange(n) % 7
    tokens, _ = choose_tokens(z.expand(n, -1), positions, Sampling.of(n, seeds, *settings))
    assert chi_square_ok(torch.bincount(tokens, minlength=vocab), filtered_softmax(z, *settings))


def test_streams_and_rounds_draw_anew():
    logits, positions = torch.zeros(2000, 50), torch.arange(2000)
    sampling = Sampling.of(2000, torch.zeros(2000, dtype=torch.int64), 1.0)
    plain = choose_tokens(logits, positions, sampling)[0]
    other = choose_tokens(logits, positions, sampling, stream=1)[0]
    later = choose_tokens(logits, positions, sampling, stream=1, rounds=positions + 1)[0]
    zero = choose_tokens(logits, positions, sampling, rounds=torch.zeros_like(positions))[0]
    assert torch.equal(plain, zero)
    for a, b in ((plain, other), (other, later), (plain, later)):
        assert 0 < (a == b).sum() < 100


def test_filters_keep_what_a_plain_loop_keeps():
    z = torch.randint(-8, 8, (200, 31)) / 2.0
    sampling = mixed_sampling(200)
    noisy = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)
    kept = z >= filter_cut(z, noisy, *sampling[2:])
    for row in range(200):
        settings = (noisy[row].item(), *(field[row].item() for field in sampling[2:]))
        assert torch.equal(kept[row], filtered_softmax(z[row], *settings) > 0), settings


def test_top_p_always_keeps_the_best():
    z = torch.randn(4, 50)
    sampling = Sampling.of(4, 0, 5.0, 0, 1e-9)
    assert torch.equal(choose_tokens(z, torch.arange(4), sampling)[0], z.argmax(1))


def test_fixed_point_is_exp():
    d, scale = -torch.rand(10_000) * 15, torch.rand(10_000) * 2 + 0.1
    exact = (d.double() * scale.double()).exp2()
    # truncation, and a polynomial that is off by less than 3e-7
    assert ((fixed_point(d, scale) * 2.0**-30 - exact).abs() <= exact * 3e-7 + 2**-30).all()
    assert fixed_point(torch.tensor([-INF, -1e30, -50.0]), torch.ones(3)).eq(0).all()
    assert fixed_point(torch.zeros(2), torch.tensor([1e-30, 3e38])).eq(2**30 - 64).all()


def test_sums_do_not_depend_on_order():
    z, sampling = torch.randn(20, 500), Sampling.of(20, 0, 1.0, 0, 0.5)
    shuffle = torch.randperm(500)
    assert torch.equal(filter_cut(z, *sampling[1:]), filter_cut(z[:, shuffle], *sampling[1:]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_odd_rows(temperature):
    logits = torch.zeros(6, 9)
    logits[0, 4] = 30
    logits[1] = -INF
    logits[2] = float("nan")
    logits[3, :8] = float("nan")
    logits[4, :] = -INF
    logits[4, 7] = -5
    logits[5, 2] = INF
    sampling = Sampling.of(6, 0, temperature, 5, 0.9, 0.01)
    tokens, status = choose_tokens(logits, torch.arange(6), sampling)
    assert tokens.tolist() == [4, 0, 0, 8, 7, 2]
    assert status.tolist() == [0, STATUS_NO_FINITE, STATUS_NAN | STATUS_NO_FINITE, STATUS_NAN, 0, 0]


def test_no_rows_and_one_token():
    assert choose_tokens(torch.empty(0, 5), torch.empty(0).long(), Sampling.of(0))[0].shape == (0,)
    assert choose_tokens(torch.randn(3, 1), torch.arange(3), Sampling.of(3, 0, 1.0, 2, 0.5, 0.5))[0].eq(0).all()


def test_inputs_are_left_alone():
    logits = torch.full((2, 8), float("nan"))
    before = logits.clone()
    choose_tokens(logits, torch.arange(2), Sampling.of(2, 0, 1.0))
    assert torch.equal(logits.isnan(), before.isnan())


def test_bad_input():
    logits, positions, sampling = torch.randn(3, 8), torch.arange(3), Sampling.of(3)
    for arguments, error in wrong_rows(logits, positions, sampling):
        with pytest.raises(error, match="choose_tokens: .*allowed"):
            choose_tokens(*arguments)
    with pytest.raises(ValueError, match="backend"):
        choose_tokens(logits, positions, sampling, backend="fpga")
    with pytest.raises(ValueError, match="stream is 4; allowed: 0 to 3"):
        choose_tokens(logits, positions, sampling, stream=4)
    for bad in ({"temperature": -1.0}, {"temperature": 1e31}, {"top_p": 0.0}, {"min_p": 1.5}, {"top_k": -1}):
        with pytest.raises(ValueError, match="allowed"):
            Sampling.of(3, **bad)


def test_opcheck_and_compile():
    args = (torch.randn(6, 40), torch.arange(6), *mixed_sampling(6), 0, None, "reference")
    torch.library.opcheck(torch.ops.beagle.choose_tokens, args)
    compiled = torch.compile(choose_tokens, fullgraph=True, backend="aot_eager")
    logits, sampling = torch.randn(6, 40), mixed_sampling(6)
    assert torch.equal(
        compiled(logits, torch.arange(6), sampling)[0], choose_tokens(logits, torch.arange(6), sampling)[0]
    )
