"""top_candidates: ranking, scores, the filters' penalty, reduced vocabularies."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import mixed_sampling

from beagle_kernels import Sampling, choose_tokens, top_candidates
from beagle_kernels.reference.philox import gumbel
from beagle_kernels.reference.sampling import filter_cut

INF = float("inf")


def test_matches_a_stable_sort_of_the_definition():
    z, sampling, positions = torch.randint(-9, 9, (40, 60)) / 4.0, mixed_sampling(40), torch.arange(40) * 3
    hot = sampling.temperature > 0
    t = sampling.temperature[:, None]
    value = z + t * gumbel(sampling.seed, positions, 60)
    value = value - 2 * t * (z < filter_cut(z, torch.where(hot, sampling.temperature, 1.0), *sampling[2:]))
    value = torch.where(hot[:, None], value, z)
    want = value.sort(dim=1, descending=True, stable=True)
    tokens, scores = top_candidates(z, 7, positions, sampling)
    assert torch.equal(tokens, want.indices[:, :7])
    kept, others = value.double().gather(1, tokens), z.double().scatter(1, tokens, -INF)
    whole = torch.logaddexp(kept.logsumexp(1), others.logsumexp(1))[:, None]
    torch.testing.assert_close(scores, (kept - whole).float(), rtol=1e-5, atol=1e-5)
    greedy = z[~hot].double().log_softmax(1).gather(1, tokens[~hot])
    torch.testing.assert_close(scores[~hot], greedy.float(), rtol=1e-5, atol=1e-5)


def test_first_candidate_is_what_coupled_sampling_chooses():
    z, sampling = torch.randn(50, 300), Sampling.of(50, 3, 0.8)
    tokens, _ = top_candidates(z, 4, torch.arange(50), sampling)
    assert torch.equal(tokens[:, 0], choose_tokens(z, torch.arange(50), sampling)[0])


def test_reduced_vocabulary_equals_the_full_one_with_the_rest_at_minus_infinity():
    ids = torch.randperm(200)[:31].sort().values
    z, sampling = torch.randn(20, 31), mixed_sampling(20)
    full = torch.full((20, 200), -INF).index_copy(1, ids, z)
    tokens, scores = top_candidates(z, 5, torch.arange(20), sampling, token_ids=ids)
    want, want_scores = top_candidates(full, 5, torch.arange(20), sampling)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(scores, want_scores)


def test_minus_infinity_and_nan_are_never_kept():
    z = torch.full((3, 6), -INF)
    z[0, [2, 4]] = torch.tensor([1.0, 2.0])
    z[1] = float("nan")
    z[1, 5] = 0.5
    tokens, scores = top_candidates(z, 3, torch.arange(3), Sampling.of(3))
    assert tokens.tolist() == [[4, 2, 0], [5, 0, 0], [0, 0, 0]]
    assert scores.isfinite().tolist() == [[True, True, False], [True, False, False], [False] * 3]
    assert not scores.isnan().any() and scores[1, 0].abs() < 1e-6


def test_bad_input():
    z, sampling = torch.randn(3, 8), Sampling.of(3)
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match="top_candidates: k is .*allowed"):
            top_candidates(z, k, torch.arange(3), sampling)
    with pytest.raises(ValueError, match="token_ids"):
        top_candidates(z, 2, torch.arange(3), sampling, token_ids=torch.arange(7))
    with pytest.raises(TypeError, match="positions"):
        top_candidates(z, 2, torch.arange(3.0), sampling)


def test_opcheck_and_compile():
    sampling = mixed_sampling(6)
    for ids in (None, torch.arange(40) * 2):
        torch.library.opcheck(
            torch.ops.beagle.top_candidates, (torch.randn(6, 40), 3, torch.arange(6), *sampling, ids, "reference")
        )
    z = torch.randn(6, 40)
    compiled = torch.compile(top_candidates, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, 3, torch.arange(6), sampling)[0], top_candidates(z, 3, torch.arange(6), sampling)[0])
