"""Philox4x32-10 against the published vectors, and the noise drawn from it."""

from __future__ import annotations

import math

import pytest
import torch
from sampling_cases import chi_square_ok

from beagle_kernels.reference import philox

# kat_vectors of Random123 (philox4x32, 10 rounds): counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize("counter, key, output", VECTORS)
def test_known_answers(counter, key, output):
    assert philox.philox(words(counter), words(key)) == words(output)


def scalar_words(seed: int, counter: int, position: int, stream: int, rounds: int) -> list[int]:
    c, k = [counter, position % 2**32, stream, rounds % 2**32], [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_gumbel(seed: int, position: int, token: int, stream: int = 0, rounds: int = 0) -> float:
    """The definition (docs/design.md: Coupled sampling) in Python integers and floats."""

    def exponential(x: int) -> float:
        return -math.log1p(-min((x + 0.5) * 2.0**-32, 1 - 2.0**-24))

    group = token // 64
    x, y = scalar_words(seed, group // 2, position, stream + 4, rounds)[2 * (group % 2) :][:2]
    least = exponential(x) / 64
    if token % 64 == y >> 26:
        return -math.log(least)
    return -math.log(least + exponential(scalar_words(seed, token // 4, position, stream, rounds)[token % 4]))


def test_gumbel_is_as_specified():
    seed = torch.tensor([0, -1, 123456789012345, 2**62 + 17])
    position = torch.tensor([0, 1, 2**31, 2**32 - 1])
    rounds = torch.tensor([0, 7, 2**31 + 5, 1])
    noise = philox.gumbel(seed, position, 150, 2, rounds)
    for row in range(4):
        for token in range(150):
            want = scalar_gumbel(int(seed[row]), int(position[row]), token, 2, int(rounds[row]))
            assert abs(noise[row, token].item() - want) < 2e-5 * max(1, abs(want))


def test_gumbel_of_a_reduced_vocabulary_is_that_of_the_full_ids():
    seed, position = torch.tensor([5, 6]), torch.tensor([3, 4])
    ids = torch.tensor([0, 1, 6, 7, 8, 95, 99, 128, 300])
    assert torch.equal(philox.gumbel(seed, position, 9, token_ids=ids), philox.gumbel(seed, position, 301)[:, ids])


def test_gumbel_is_finite_and_gumbel():
    noise = philox.gumbel(torch.arange(8), torch.arange(8), 50_000).double()
    assert noise.isfinite().all()
    # Kolmogorov-Smirnov against exp(-exp(-g)); 1.95 / sqrt(n) is the 0.1% point
    ordered = noise.flatten().sort().values
    n = len(ordered)
    gap = ((-(-ordered).exp()).exp() - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.95 / math.sqrt(n)


def uniforms(tokens: list[int], draws: int = 60_000) -> torch.Tensor:
    """Noise of these tokens [draws, n] as uniform variables, half the draws by seed and half by position."""
    many, one = torch.arange(draws // 2), torch.full((draws // 2,), 3)
    ids = torch.tensor(tokens)
    by_seed, by_position = (philox.gumbel(*pair, len(tokens), token_ids=ids) for pair in ((many, one), (one, many)))
    return (-(-torch.cat((by_seed, by_position)).double()).exp()).exp()


@pytest.mark.parametrize(
    "pair", [(0, 1), (0, 4), (3, 63), (17, 40), (5, 69), (63, 64), (64, 127), (1, 129), (127, 128), (10, 74)]
)
def test_noise_of_two_tokens_is_independent(pair):
    """Of one group and of two, that share a call of Philox or do not: 8 x 8 cells are equally likely."""
    cells = (uniforms([*pair]) * 8).long().clamp(max=7)
    counts = torch.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64)
    assert chi_square_ok(counts, torch.full((64,), 1 / 64))


def test_a_group_has_its_largest_noise_anywhere_and_the_rest_below_in_any_order():
    u = uniforms([*range(64, 128)], 40_000)
    assert chi_square_ok(torch.bincount(u.argmax(1), minlength=64), torch.full((64,), 1 / 64))
    largest, second = u.topk(2).values.unbind(1)
    # of 64 independent uniform variables: (second / largest)^63 and largest^64 are uniform and independent
    cells = torch.stack(((second / largest) ** 63, largest**64), 1).mul(6).long().clamp(max=5)
    assert chi_square_ok(torch.bincount(cells[:, 0] * 6 + cells[:, 1], minlength=36), torch.full((36,), 1 / 36))


@pytest.mark.parametrize("other", ["seed", "position", "stream", "rounds"])
def test_every_part_of_the_counter_and_key_matters(other):
    arguments = {"seed": torch.tensor([1]), "position": torch.tensor([2]), "stream": 1, "rounds": torch.tensor([3])}
    first = philox.gumbel(vocab=1000, **arguments)
    arguments[other] = arguments[other] + 1
    assert (first == philox.gumbel(vocab=1000, **arguments)).sum() == 0


def test_extreme_words_stay_finite():
    x = torch.tensor([0, 1, 2**32 - 1, 2**32 - 256, 2**31])
    v = ((x.double() + 0.5) * 2**-32).float().clamp(max=philox.LARGEST)
    g = -(-torch.log1p(-v)).log()
    assert g.isfinite().all() and g[0] > 22 and g[2] < -2.8
