"""lookup: against a plain loop, texts that repeat themselves, placeholders, and lengths of any value."""

from __future__ import annotations

import random

import pytest
import torch

from beagle_kernels import backends, lookup

BACKENDS = ("cpu", "reference")


def loop_lookup(text: list[int], length: int, count: int, longest: int) -> tuple[list[int], int]:
    """One row by the words of the contract: every earlier end, from the latest on, token by token."""
    text = text[: max(length, 0)]
    best, best_end = 0, 0
    for end in range(len(text) - 1, 0, -1):
        matched = 0
        while matched < min(longest, end):
            token = text[end - 1 - matched]
            if token < 0 or token != text[len(text) - 1 - matched]:
                break
            matched += 1
        if matched > best:
            best, best_end = matched, end
    if best == 0:
        return [-1] * count, 0
    copied: list[int] = []
    for i in range(count):
        token = (text + copied)[best_end + i]
        copied.append(-1 if token < 0 or -1 in copied else token)
    return copied, best


def random_texts(batch: int, size: int, seed: int) -> torch.Tensor:
    """Few tokens, so that much matches: at random, or pieces copied from before; some with placeholders in them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(batch):
        vocab, row = rng.choice((1, 2, 3, 30)), []
        while len(row) < size:
            start = rng.randrange(len(row)) if row and rng.random() < 0.5 else None
            row += [rng.randrange(vocab)] if start is None else row[start : start + rng.randrange(1, 40)]
        holes = rng.choice((0, 0, 0.02, 0.3))
        rows.append([-rng.randrange(1, 3) if rng.random() < holes else token for token in row[:size]])
    return torch.tensor(rows, dtype=torch.int64).view(batch, size)


def check(text, lengths, count, longest, backend):
    tokens, matched = lookup(text, lengths, count, longest=longest, backend=backend)
    assert tokens.shape == (len(text), count) and tokens.dtype == torch.int64 and matched.dtype == torch.int32
    for row, length in enumerate(lengths.tolist()):
        want = loop_lookup(text[row].tolist(), length, count, longest)
        assert (tokens[row].tolist(), int(matched[row])) == want, (backend, row, length, longest)
    return matched


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "size, longest", [(1, 16), (2, 1), (9, 3), (60, 16), (257, 16), (258, 1), (300, 1024), (800, 40)]
)
def test_equals_a_plain_loop(size, longest, backend):
    found = []
    for seed in range(4):
        text = random_texts(6, size, seed)
        lengths = torch.randint(size + 1, (6,), dtype=torch.int32)
        lengths[:2] = torch.tensor([size, size - 1])
        found.append(check(text, lengths, seed * 21, longest, backend))
    matched = torch.cat(found)
    assert size < 9 or (matched.max() > 1 or longest == 1) and matched.unique().numel() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_then_the_latest(backend):
    text = torch.tensor([[1, 2, 3, 7, 2, 3, 8, 3, 9, 1, 2, 3]])
    length = torch.tensor([12], dtype=torch.int32)
    for longest, follows in [(16, [7, 2]), (3, [7, 2]), (2, [8, 3]), (1, [9, 1])]:
        tokens, matched = lookup(text, length, 2, longest=longest, backend=backend)
        assert tokens.tolist() == [follows] and matched.item() == min(longest, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_goes_on_into_itself(backend):
    text = torch.tensor([[9, 1, 2, 3, 1, 2, 3, 1], [5, 5, 5, 5, 5, 5, 5, 5]])
    tokens, matched = lookup(text, torch.tensor([8, 8], dtype=torch.int32), 64, backend=backend)
    assert tokens[0].tolist() == ([2, 3, 1] * 22)[:64] and tokens[1].eq(5).all()
    assert matched.tolist() == [4, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_placeholders_match_nothing_and_end_the_copy(backend):
    rows = [[4, -1, 6, 4, -1], [4, -1, 6, 4, 4], [-1, 4, 6, 7, -1, 4], [4, 6, -1, 7, 4]]
    lengths = torch.tensor([5, 4, 6, 5], dtype=torch.int32)
    text = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    tokens, matched = lookup(text, lengths, 3, backend=backend)
    assert tokens.tolist() == [[-1] * 3, [-1] * 3, [6, 7, -1], [6, -1, -1]] and matched.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_the_length_is_not_used(backend):
    text = random_texts(4, 90, seed=3).abs()
    lengths = torch.tensor([40, 1, 0, 89], dtype=torch.int32)
    want = lookup(text, lengths, 20, backend=backend)
    text[torch.arange(90) >= lengths[:, None]] = -(2**63)
    for have, before in zip(lookup(text, lengths, 20, backend=backend), want):
        assert torch.equal(have, before)
    assert want[1][1:3].tolist() == [0, 0] and want[0][1:3].eq(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_any_value_and_texts_of_no_tokens(backend):
    text = random_texts(4, 30, seed=8)
    wild = torch.tensor([-(2**31), -1, 31, 2**31 - 1], dtype=torch.int32)
    for have, want in zip(*(lookup(text, each, 9, backend=backend) for each in (wild, wild.clamp(0, 30)))):
        assert torch.equal(have, want)
    tokens, matched = lookup(text[:, :0], wild, 9, backend=backend)
    assert tokens.eq(-1).all() and tokens.shape == (4, 9) and not matched.any()
    assert lookup(text[:0], wild[:0], 9, backend=backend)[0].shape == (0, 9)


def test_long_texts_and_tokens_of_any_size():
    """An end far back, behind others that match less; tokens that only the high half of a word tells apart."""
    text = torch.randint(3, (3, 20000)) + 2**40
    text[1] = torch.where(text[1] % 3 == 0, 2**40, 2**41)
    text[2, 50:62], text[2, -12:] = torch.arange(12) + 2**62, torch.arange(12) + 2**62
    results = [lookup(text, torch.full((3,), 20000).int(), 30, longest=40, backend=name) for name in BACKENDS]
    assert all(torch.equal(one, two) for one, two in zip(*results))
    assert results[0][1][2] == 12 and torch.equal(results[0][0][2], text[2, 62:92])


def test_rows_of_a_wider_buffer_are_read_where_they_lie():
    buffer = random_texts(5, 200, seed=2)
    lengths = torch.tensor([100, 90, 3, 100, 55], dtype=torch.int32)
    for have, want in zip(lookup(buffer[:, 50:150], lengths, 8), lookup(buffer[:, 50:150].clone(), lengths, 8)):
        assert torch.equal(have, want)
    assert backends.resolve("lookup", "auto", torch.device("cpu")) == "cpu"


def test_bad_input():
    text, lengths = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    for arguments, options, error in [
        ((text.int(), lengths, 4), {}, TypeError),
        ((text[0], lengths, 4), {}, ValueError),
        ((text, lengths.long(), 4), {}, TypeError),
        ((text, lengths[:1], 4), {}, ValueError),
        ((text, lengths, -1), {}, ValueError),
        ((text, lengths, 65), {}, ValueError),
        ((text, lengths, 4.0), {}, TypeError),
        ((text, lengths, 4), {"longest": 0}, ValueError),
        ((text, lengths, 4), {"longest": 1025}, ValueError),
        ((text, lengths.to("meta"), 4), {}, ValueError),
    ]:
        with pytest.raises(error, match="lookup: .*allowed"):
            lookup(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    text, lengths = random_texts(3, 40, seed=1), torch.tensor([40, 7, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.beagle.lookup, (text, lengths, 5, 16, backend))
    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(text, lengths, 5, backend=backend), lookup(text, lengths, 5, backend=backend)):
        assert torch.equal(have, want)
