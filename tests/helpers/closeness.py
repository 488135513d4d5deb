"""How far a kernel's result may lie from the truth: as far as eager PyTorch's in the same precision, or rounding's."""

from __future__ import annotations

import torch


def random(shape, dtype, device, gen, scale=1.0):
    return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).to(device, dtype)


def score_rounding(q, k) -> float:
    """What rounding does to a score, absolute: to one weight, relative. Of q [.., heads, D] and k [.., key heads, D].

    A product in fp32 is right to half a unit, 2^-24, of the magnitudes that it adds up; where a GPU makes it of three
    TF32 products, whose two parts of a factor hold 22 of its 24 bits, to 2^-22.
    """
    unit = 2.0**-22 if (q.dtype, q.device.type) == (torch.float32, "cuda") else 2.0**-24
    longest = (x.detach().double().nan_to_num(0.0).norm(dim=-1).amax() for x in (q, k))
    return unit * float(next(longest) * next(longest)) * q.shape[-1] ** -0.5


def close_as_eager(got, eager, exact, factor: float, what: str, rounding: float = 0.0) -> None:
    """Error against float64 at most `factor` times eager PyTorch's, or than what rounding costs: of the result to its
    own dtype, and of what it is made of, `rounding`, relative to the largest or to the mean.

    A GPU's exponentials and logarithms in fp32, ex2.approx and lg2.approx, are right to 2^-22, not half a unit.
    """
    unit = 2.0**-22 if (got.dtype, got.device.type) == (torch.float32, "cuda") else torch.finfo(got.dtype).eps / 2
    for name, size in (("largest", lambda x: x.abs().amax()), ("rms", lambda x: x.square().mean().sqrt())):
        if exact.numel() == 0:
            assert got.shape == exact.shape
            continue
        floor = max(size(exact.to(got.dtype).double() - exact), max(unit, rounding) * size(exact))
        allowed = factor * max(size(eager.double() - exact), floor)
        error = size(got.double() - exact)
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"
