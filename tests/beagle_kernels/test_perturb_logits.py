"""perturb_logits: the values behind choose_tokens, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import mixed_sampling, wrong_rows

from beagle_kernels import STATUS_NAN, STATUS_NO_FINITE, Sampling, backends, choose_tokens, perturb_logits
from beagle_kernels.reference.philox import gumbel
from beagle_kernels.reference.sampling import filter_cut

INF = float("inf")
HERE = [name for name in ("reference", "cpu") if backends.why_not("perturb_logits", name, torch.device("cpu")) is None]
each_backend = pytest.mark.parametrize("backend", HERE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(count: int = 40):
    """Rows and vocabularies of every kind: odd sizes, ties, peaks, -inf, NaN, inf, views."""
    for seed in range(count):
        pick = torch.Generator().manual_seed(seed)
        rows, vocab = [(1, 1), (3, 63), (4, 64), (7, 113), (5, 1025), (2, 49152), (3, 16400)][seed % 7]
        z = torch.randn(rows, vocab + 3, generator=pick) * (1, 8, 20)[seed % 3]
        z = z.round() if seed % 4 == 1 else z
        for row, value in ((0, float("nan")), (rows - 1, -INF), (rows // 2, INF)):
            if seed % 5 == row % 5:
                z[row, torch.rand(vocab + 3, generator=pick) < (0.1, 1.0)[seed % 2]] = value
        z = z.to(DTYPES[seed % 3])
        view = z[:, 3:] if seed % 2 else z[:, 3:].t().contiguous().t()
        yield view, torch.arange(rows) + 1000 * seed, mixed_sampling(rows, seed)


@each_backend
def test_the_best_value_is_the_chosen_token(backend):
    for args in cases():
        values, status = perturb_logits(*args, backend=backend)
        tokens, have = choose_tokens(*args, backend=backend)
        assert values.dtype == torch.float32 and values.is_contiguous()
        assert values.argmax(-1).equal(tokens) and status.equal(have)


@each_backend
def test_values_are_the_filtered_logits_and_the_noise(backend):
    torch.manual_seed(1)
    z, positions = torch.randn(24, 700) * 3, torch.arange(24) * 5
    sampling = mixed_sampling(24)
    values, _ = perturb_logits(z, positions, sampling, backend=backend)
    cold = sampling.temperature == 0
    assert cold.any() and values[cold].equal(z[cold])
    t = torch.where(cold, 1.0, sampling.temperature)
    kept = (z >= filter_cut(z, t, *sampling[2:])) | cold[:, None]
    assert values.isfinite().equal(kept) and not kept[~cold].all()
    want = z.double() + sampling.temperature[:, None].double() * gumbel(sampling.seed, positions, 700).double()
    assert ((values - want).abs() <= 1e-5 * (1 + sampling.temperature[:, None])).masked_fill(~kept, True).all()


@pytest.mark.skipif("cpu" not in HERE, reason="the extension is not built")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_host_executor_is_the_reference(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for args in cases():
            have, have_status = perturb_logits(*args, backend="cpu")
            want, want_status = perturb_logits(*args, backend="reference")
            assert have_status.equal(want_status) and have.isinf().equal(want.isinf())
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-5 * float(args[2].temperature.max()))
    finally:
        torch.set_num_threads(before)


@each_backend
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_odd_rows(backend, temperature):
    logits = torch.zeros(4, 70)
    logits[0] = -INF
    logits[1] = float("nan")
    logits[2, :69] = float("nan")
    logits[3, 2] = INF
    values, status = perturb_logits(logits, torch.arange(4), Sampling.of(4, 0, temperature, 5, 0.9), backend=backend)
    assert status.tolist() == [STATUS_NO_FINITE, STATUS_NAN | STATUS_NO_FINITE, STATUS_NAN, 0]
    assert values.argmax(-1).tolist() == [0, 0, 69, 2] and not values.isnan().any()
    assert values[:3].isfinite().sum(-1).tolist() == [1, 1, 1] and values[3, 2] < INF


@each_backend
def test_no_rows_and_inputs_left_alone(backend):
    empty, status = perturb_logits(torch.empty(0, 5), torch.empty(0).long(), Sampling.of(0), backend=backend)
    assert empty.shape == (0, 5) and status.shape == (0,)
    logits = torch.full((2, 8), float("nan"))
    logits[0] = torch.arange(8)
    before = logits.clone()
    values, _ = perturb_logits(logits, torch.arange(2), Sampling.of(2, 0, 0.0), backend=backend)
    values.zero_()
    torch.testing.assert_close(logits, before, equal_nan=True)


def test_bad_input():
    for arguments, error in wrong_rows(torch.randn(3, 8), torch.arange(3), Sampling.of(3)):
        with pytest.raises(error, match="perturb_logits: .*allowed"):
            perturb_logits(*arguments)


def test_opcheck_and_compile():
    args = (torch.randn(4, 40), torch.arange(4), *mixed_sampling(4))
    for backend in HERE:
        torch.library.opcheck(torch.ops.beagle.perturb_logits, (*args, backend))
        compiled = torch.compile(lambda z, at, s, b=backend: perturb_logits(z, at, s, backend=b), fullgraph=True)
        for have, want in zip(
            compiled(args[0], args[1], Sampling(*args[2:])),
            perturb_logits(*args[:2], Sampling(*args[2:]), backend=backend),
        ):
            assert have.equal(want)
        torch.library.opcheck(torch.ops.beagle.perturb_logits, (args[0].t().contiguous().t(), *args[1:], backend))
