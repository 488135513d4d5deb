"""Hostile input to the attention ops and the loss, in memory whose surroundings are NaN: what lies outside is neither
used nor written.

Each check takes a device, a number of rounds, a backend and the first round's number. `python fault_cases.py OP ROUNDS`
runs one on the Triton backend under the interpreter.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from beagle_kernels import block_attention, distill_loss, extend_attention, tree_attention

INT32 = 2**31 - 1
GUARD = 4096
"""Elements of NaN on either side of every tensor."""


def guarded(x: Tensor, device: str) -> Tensor:
    """The same values between NaNs, or, for integers, between numbers that fit nowhere."""
    fill = float("nan") if x.is_floating_point() else -77
    whole = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype, device=device)
    inside = whole[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


class GuardedOutputs:
    """Inside the block every new tensor stands in a guarded buffer; at its end all guards must be as they were."""

    def __enter__(self):
        self.buffers: list[tuple[Tensor, int]] = []
        self.before = torch.Tensor.new_empty, torch.empty_like, torch.empty

        def new_empty(x, *shape, dtype=None, **options):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            count = torch.Size(shape).numel()
            whole = self.before[0](x, count + 2 * GUARD, dtype=dtype, **options).fill_(-77)
            self.buffers.append((whole, count))
            return whole[GUARD : GUARD + count].view(shape)

        torch.Tensor.new_empty = new_empty
        torch.empty_like = lambda x, **options: new_empty(x, x.shape, **options)
        anchor = torch.zeros(0)
        torch.empty = lambda *shape, **options: new_empty(anchor, *shape, **options)
        return self

    def __exit__(self, kind, error, trace):
        torch.Tensor.new_empty, torch.empty_like, torch.empty = self.before
        if kind is None:
            for whole, count in self.buffers:
                assert (whole[:GUARD] == -77).all() and (whole[GUARD + count :] == -77).all(), "a stray write"


def one_of(pick: torch.Generator, values: list, shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=pick)]


def normal(pick: torch.Generator, device: str, *shape: int) -> Tensor:
    return guarded(torch.randn(shape, generator=pick), device)


def check_block_attention(device: str, rounds: int, backend: str, first: int = 0) -> int:
    """Windows, offsets and bounds of any value; ascending bounds give what the reference gives."""
    for seed in range(first, first + rounds):
        pick = torch.Generator().manual_seed(seed)
        sizes = [1, 7, 40, 40], [1, 4, 5, 64, 2**40], [1, 3, 5, 17, 2**40]
        rows, window, reach = (int(one_of(pick, values, (), torch.int64)) for values in sizes)
        reach = reach if seed % 4 > 1 else None
        count = int(torch.randint(1, 5, (), generator=pick))
        offset = one_of(pick, [-INT32 - 1, -9, -3, -1, 0, 1, 3, rows, INT32], (count,), torch.int32)
        offset = guarded(offset, device)
        bounds = one_of(pick, [-INT32 - 1, -1, 0, 3, 11, 25, rows, INT32], (count + 1,), torch.int32)
        bounds = bounds.sort().values if seed % 2 else bounds
        bounds = None if count == 1 and seed % 3 else guarded(bounds, device)
        q, k, v = (normal(pick, device, rows, heads, 16).requires_grad_() for heads in (4, 2, 2))
        with GuardedOutputs():
            out, lse = block_attention(q, k, v, window, offset, bounds, reach=reach, backend=backend)
            seen = out, lse.nan_to_num(neginf=0.0)
            grads = torch.autograd.grad(seen, (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        found = out, *grads
        what = f"round {seed}: window {window}, reach {reach}, offset {offset.tolist()}, bounds {bounds}"
        assert all(x.isfinite().all() for x in found) and not lse.isnan().any() and (lse < INT32).all(), what
        if bounds is None or bounds.equal(bounds.sort().values):
            want = block_attention(q, k, v, window, offset, bounds, reach=reach, backend="reference")
            seen = want[0], want[1].nan_to_num(neginf=0.0)
            want += torch.autograd.grad(seen, (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
            torch.testing.assert_close((out, lse, *grads), want, rtol=1e-4, atol=1e-4, msg=what)
    return rounds


def check_tree_attention(device: str, rounds: int, backend: str, first: int = 0) -> int:
    """Lengths, masks, page numbers, starts and sinks of any value, dense and paged: what the reference gives."""
    for seed in range(first, first + rounds):
        pick = torch.Generator().manual_seed(seed)
        nodes, slots = (int(one_of(pick, values, (), torch.int64)) for values in ([1, 5, 66], [1, 7, 40]))
        batch = 1 if nodes == 66 else 3
        lengths = guarded(one_of(pick, [-INT32 - 1, -1, 0, 1, slots, slots + 1, INT32], (batch,), torch.int32), device)
        words = [0, -1, 1, 2**63 - 1, -(2**63), 0b1011]
        mask = guarded(one_of(pick, words, (batch, nodes, (nodes + 63) // 64), torch.int64), device)
        pages = batch if seed % 2 else 4
        q, k = normal(pick, device, batch, nodes, 2, 16), normal(pick, device, pages, 1, slots, 16)
        v = normal(pick, device, pages, 1, slots, (16, 24, 5)[seed % 3])
        table = guarded(one_of(pick, [-INT32 - 1, -1, 0, 1, 3, 4, INT32], (batch, 3), torch.int32), device)
        table = None if seed % 2 else table
        starts = one_of(pick, [-INT32 - 1, -1, 0, 1, slots, slots + 1, 2 * slots, INT32], (batch, nodes), torch.int32)
        sinks = one_of(pick, [-torch.inf, -3e38, 0.0, 1.0, 3e38, torch.inf, torch.nan], (2,), torch.float32)
        more = {
            "starts": guarded(starts, device) if seed % 5 < 3 else None,
            "sinks": guarded(sinks, device) if seed % 4 > 1 else None,
            "softcap": (None, 1.5, 1e-30, None, 1e30)[seed % 5],
        }
        with GuardedOutputs():
            got = tree_attention(q, k, v, lengths, mask, block_table=table, **more, backend=backend)
        want = tree_attention(q, k, v, lengths, mask, block_table=table, **more, backend="reference")
        what = f"round {seed}: lengths {lengths.tolist()}, table {table}, {more}"
        assert got.isfinite().all() or (more["sinks"] is not None and sinks.isnan().any()), what
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=what)
    return rounds


def check_extend_attention(device: str, rounds: int, backend: str, first: int = 0) -> int:
    """A row that is not a number spoils no other row, forward or backward."""
    for seed in range(first, first + rounds):
        pick = torch.Generator().manual_seed(seed)
        rows, m = (int(one_of(pick, values, (), torch.int64)) for values in ([1, 6, 33], [0, 1, 4]))
        clean = [
            torch.randn(shape, generator=pick)
            for shape in ((rows, 4, 16), (rows, 4), (rows, 4, 16), (rows, m, 2, 16), (rows, m, 2, 16))
        ]
        clean[1][torch.rand(rows, 4, generator=pick) < 0.3] = -torch.inf
        bad, which = int(torch.randint(rows, (), generator=pick)), seed % 5
        spoiled = [x.clone() for x in clean]
        spoiled[which][bad] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
        results = []
        for tensors in (clean, spoiled):
            leaves = [guarded(x, device).requires_grad_() for x in tensors]
            with GuardedOutputs():
                out, lse = extend_attention(*leaves, backend=backend)
                ups = torch.ones_like(out), torch.ones_like(lse)
                results.append([out, lse, *torch.autograd.grad((out, lse), leaves, ups)])
        others = torch.arange(rows, device=device) != bad
        for one, two in zip(*results, strict=True):
            assert not two[others].isnan().any() and one[others].equal(two[others]), f"round {seed}"
    return rounds


def check_distill_loss(device: str, rounds: int, backend: str, first: int = 0) -> int:
    """A row without weight may hold anything; one with weight spoils the loss, and no other row's gradient."""
    for seed in range(first, first + rounds):
        pick = torch.Generator().manual_seed(seed)
        rows, vocab = (int(one_of(pick, values, (), torch.int64)) for values in ([2, 5], [1, 300]))
        student, teacher, weight = (torch.randn(shape, 16, generator=pick) for shape in (rows, rows, vocab))
        weights = torch.rand(rows, generator=pick) + 0.1
        bad, counts = int(torch.randint(rows, (), generator=pick)), seed % 2
        weights[bad] *= counts
        results = []
        for odd in (0.0, (torch.nan, torch.inf, 3e38)[seed % 3]):
            (student, teacher)[seed % 3 % 2][bad] = odd
            leaf = guarded(student, device).requires_grad_()
            with GuardedOutputs():
                others = [guarded(x, device) for x in (teacher, weight, weights)]
                loss = distill_loss(leaf, *others, backend=backend)
                results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        (loss, grad), (odd_loss, odd_grad) = results
        rest = torch.arange(rows, device=device) != bad
        assert grad[rest].equal(odd_grad[rest]) and grad[rest].isfinite().all(), f"round {seed}"
        assert counts or (loss.equal(odd_loss) and not odd_grad[bad].any()), f"round {seed}"
        assert not counts or not odd_loss.isfinite() or odd_loss > loss, f"round {seed}"
    return rounds


CHECKS = {
    "block_attention": check_block_attention,
    "tree_attention": check_tree_attention,
    "extend_attention": check_extend_attention,
    "distill_loss": check_distill_loss,
}


if __name__ == "__main__":
    import triton  # noqa: F401  # asks for its interpreter
    from triton_cases import small_tiles

    torch.set_num_threads(1)
    small_tiles()
    print(CHECKS[sys.argv[1]]("cpu", int(sys.argv[2]), "triton"))
