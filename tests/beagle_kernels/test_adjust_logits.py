"""adjust_logits: a plain loop, transformers' processors, odd input, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from adjust_cases import bits_of, by_loops, case
from torch import Tensor

from beagle_kernels import Adjustments, adjust_logits, backends

INF = math.inf
HERE = [name for name in ("reference", "cpu") if backends.why_not("adjust_logits", name, torch.device("cpu")) is None]
each_backend = pytest.mark.parametrize("backend", HERE)
needs_cpu = pytest.mark.skipif("cpu" not in HERE, reason="the extension is not built")


def same(have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


def words(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize("seed", [seed for seed in range(50) if seed % 25 < 15])
def test_equals_a_plain_loop(backend, seed):
    args, options = case(seed)
    before = args[0].clone()
    have = adjust_logits(*args, **options, backend=backend)
    assert have.dtype == torch.float32 and have.is_contiguous()
    same(have, by_loops(*args, **options))
    same(args[0], before)


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_host_executor_is_the_reference(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed in range(100):
            args, options = case(seed)
            same(*(adjust_logits(*args, **options, backend=name) for name in ("cpu", "reference")))
    finally:
        torch.set_num_threads(before)


@needs_cpu
def test_a_row_in_parts_and_rows_of_odd_sizes():
    """One node of a vocabulary long enough to be shared out over threads, phrases and texts in all its parts."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for vocab in (16384, 49152, 50257):
            text = torch.randint(vocab, (2, 500))
            given = Adjustments.of(
                2,
                repetition=1.2,
                frequency=0.1,
                ngram=1,
                first=torch.randint(2, (2, vocab)),
                phrases=[([int(v)], 0.5) for v in torch.randint(vocab, (40,))],
            )
            allowed = bits_of(torch.rand(2, 1, vocab) < 0.9)
            args = torch.randn(2, 1, vocab), text[:, None, :4], text, ints(400, 500), ints(200, 0), given
            same(*(adjust_logits(*args, allowed=allowed, backend=name) for name in ("cpu", "reference")))
    finally:
        torch.set_num_threads(before)


def processed(processor, text: Tensor, z: Tensor, lengths: list[int], paths: Tensor) -> Tensor:
    """What a processor of transformers makes of each node's logits, node by node."""
    out = torch.empty_like(z)
    for b, n in torch.cartesian_prod(*map(torch.arange, z.shape[:2])).tolist():
        prefix = torch.cat((text[b, : lengths[b]], paths[b, n][paths[b, n] >= 0]))[None]
        out[b, n] = processor(prefix, z[b, n][None].clone())[0]
    return out


PHRASES = [[3], [1, 2], [2, 2], [0, 1], [4, 0, 1], [1, 1, 1, 1, 1, 1]]


def processors(vocab: int):
    """Settings of ours, and transformers' processor for the same."""
    kinds = pytest.importorskip("transformers.generation.logits_process")
    first = torch.zeros(3, vocab)
    first[:, [1, 4]] = 9
    biased = {tuple(phrase): 0.3 * i - 0.7 for i, phrase in enumerate(PHRASES)}
    many = [(phrase, bias) for phrase, bias in biased.items() if len(phrase) > 1]
    single = torch.zeros(vocab).index_put((torch.tensor([3]),), torch.tensor(biased[(3,)]))
    yield Adjustments.of(3, repetition=1.3), kinds.RepetitionPenaltyLogitsProcessor(1.3)
    yield Adjustments.of(3, repetition=0.8), kinds.RepetitionPenaltyLogitsProcessor(0.8)
    for n in (1, 2, 3, 5, 400):
        yield Adjustments.of(3, ngram=n), kinds.NoRepeatNGramLogitsProcessor(n)
    yield Adjustments.of(3, phrases=[(p, -INF) for p in PHRASES]), kinds.NoBadWordsLogitsProcessor(PHRASES)
    yield Adjustments.of(3, added=single.expand(3, -1), phrases=many), kinds.SequenceBiasLogitsProcessor(biased)
    yield Adjustments.of(3, phrases=list(biased.items())), kinds.SequenceBiasLogitsProcessor(biased)
    yield Adjustments.of(3, first=first), kinds.MinNewTokensLengthLogitsProcessor(4, 9, [1, 4])


@each_backend
@pytest.mark.parametrize("which", range(11))
def test_equals_transformers_bit_for_bit(backend, which):
    """One setting at a time, on texts of few different tokens, prompts of 4."""
    vocab, pick = 40, torch.Generator().manual_seed(which)
    given, processor = list(processors(vocab))[which]
    for slots, few in ((4, 3), (12, 5), (60, 6), (200, 40)):
        text = torch.randint(few, (3, slots), generator=pick)
        paths = torch.randint(few, (3, 5, 6), generator=pick)
        paths = paths.masked_fill(torch.arange(6) < torch.arange(5)[:, None] + (slots > 4), -1)
        z, lengths = torch.randn(3, 5, vocab, generator=pick) * 4, [slots, max(4, slots - 3), 4]
        have = adjust_logits(z, paths, text, ints(*lengths), ints(4, 4, 4), given, backend=backend)
        assert have.equal(processed(processor, text, z, lengths, paths))


@each_backend
def test_a_chain_of_processors_is_the_same_in_order(backend):
    kinds = pytest.importorskip("transformers.generation.logits_process")
    vocab = 30
    phrases = [((1, 2), 1.5), ((0, 1), -2.0), ((2,), 0.5)]
    chain = (
        kinds.SequenceBiasLogitsProcessor(dict(phrases)),
        kinds.RepetitionPenaltyLogitsProcessor(1.2),
        kinds.NoRepeatNGramLogitsProcessor(3),
        kinds.MinNewTokensLengthLogitsProcessor(4, 8, [2]),
    )

    def all_of_them(prefix: Tensor, scores: Tensor) -> Tensor:
        for one in chain:
            scores = one(prefix, scores)
        return scores

    first = (torch.arange(vocab) == 2).int() * 8
    given = Adjustments.of(2, phrases=phrases, repetition=1.2, ngram=3, first=first.expand(2, -1))
    text, z, paths = torch.randint(4, (2, 30)), torch.randn(2, 3, vocab), torch.randint(4, (2, 3, 2))
    have = adjust_logits(z, paths, text, ints(30, 7), ints(4, 4), given, backend=backend)
    assert have.equal(processed(all_of_them, text, z, [30, 7], paths))


@each_backend
def test_nothing_set_is_a_copy(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.randn(2, 3, 100).to(dtype)
        z[0, 0, :4] = torch.tensor([INF, -INF, math.nan, -0.0])
        paths, text, off = torch.zeros(2, 3, 2).long(), torch.zeros(2, 4).long(), Adjustments.of(2)
        have = adjust_logits(z, paths, text, ints(4, 2), ints(1, 0), off, backend=backend)
        same(have, z.float())
        assert have.data_ptr() != z.data_ptr()


@each_backend
def test_phrases_cross_from_the_text_into_the_path(backend):
    given = Adjustments.of(1, phrases=[([5, 6, 7], 2.0), ([6, 7], 1.0), ([5, 6, 7], -9.0, 0), ([9, 5, 6, 7], 50.0)])
    text, paths = words(8, 5, 6), torch.tensor([[[-1, 6], [5, 6], [-1, -1]]])
    z = torch.zeros(1, 3, 10)
    have = adjust_logits(z, paths, text, ints(2), ints(0), given, backend=backend)
    assert have[0, :, 7].tolist() == [2.0 + 1.0 - 9.0, 2.0 + 1.0 - 9.0, 0.0] and have.count_nonzero() == 2


@each_backend
def test_counts_leave_the_prompt_out_and_take_the_path_in(backend):
    given = Adjustments.of(1, frequency=0.5, presence=0.25)
    text, paths = words(3, 3, 4, 4, 5), torch.tensor([[[-1, -1], [5, 5], [4, 6]]])
    have = adjust_logits(torch.zeros(1, 3, 8), paths, text, ints(5), ints(2), given, backend=backend)
    assert have[0].tolist() == [
        [0, 0, 0, 0, -1.25, -0.75, 0, 0],
        [0, 0, 0, 0, -1.25, -1.75, 0, 0],
        [0, 0, 0, 0, -1.75, -0.75, -0.75, 0],
    ]


@each_backend
def test_empty_texts_paths_and_phrases(backend):
    given = Adjustments.of(2, repetition=2.0, frequency=1.0, ngram=1, phrases=[([1, 2], 5.0), ([3], 7.0)])
    z, nothing = torch.ones(2, 1, 5), torch.empty(2, 0).long()
    have = adjust_logits(z, nothing[:, None], nothing, ints(0, 0), ints(0, 0), given, backend=backend)
    assert have.tolist() == [[[1, 1, 1, 8, 1]]] * 2
    none = given._replace(phrases=torch.empty(2, 0).long())
    assert adjust_logits(z, nothing[:, None], nothing, ints(0, 0), ints(0, 0), none, backend=backend).equal(z)
    for shape in ((0, 3, 5), (2, 0, 5)):
        empty, batch = torch.empty(shape), shape[0]
        numbers = torch.zeros(batch, dtype=torch.int32)
        args = empty, torch.empty(*shape[:2], 4).long(), torch.empty(batch, 3).long(), numbers, numbers
        assert adjust_logits(*args, Adjustments.of(batch), backend=backend).shape == shape


@each_backend
def test_nan_and_infinities(backend):
    z = torch.tensor([[[math.nan, math.nan, -INF, INF, -INF, INF]]])
    given = Adjustments.of(1, repetition=1.5, frequency=1.0, ngram=2, phrases=[([5], -INF)])
    text = words(0, 2, 3, 1, 0, 4, 1)
    have = adjust_logits(z, torch.empty(1, 1, 0).long(), text, ints(7), ints(0), given, backend=backend)
    same(have, torch.tensor([[[-INF, math.nan, -INF, INF, -INF, math.nan]]]))


@each_backend
@pytest.mark.parametrize("lengths, prompts", [(-5, 3), (99, -1), (4, 77), (2**31 - 1, 2**31 - 1), (-(2**31), 0)])
def test_lengths_out_of_bounds_are_the_nearest(backend, lengths, prompts):
    given = Adjustments.of(1, repetition=1.5, frequency=1.0, ngram=2, first=torch.full((1, 5), 2))
    text, z, paths = torch.randint(5, (1, 9)), torch.randn(1, 2, 5), torch.randint(5, (1, 2, 2))
    length = min(max(lengths, 0), 9)
    want = adjust_logits(z, paths, text, ints(length), ints(min(max(prompts, 0), length)), given, backend="reference")
    same(adjust_logits(z, paths, text, ints(lengths), ints(prompts), given, backend=backend), want)


@each_backend
def test_wild_settings_and_ids_are_the_reference_s(backend):
    """Numbers that no constructor makes, ids beyond the tables, a path broken by padding."""
    nan, few = math.nan, torch.tensor([0, 2, 5, 9, 70])
    for value in (nan, INF, -INF, 0.0, -1.0, 3e38):
        given = Adjustments(
            torch.tensor([[1.0, nan, INF]]),
            ints(3, -(2**31), 2**31 - 1)[None],
            torch.tensor([[2, -1, 5], [-1, -1, -1], [-1, 5, 9], [-1, 2**62, 2]]),
            torch.tensor([value] * 4),
            ints(-1, -1, 0, 5),
            *(torch.tensor([value]) for _ in range(3)),
            ints(-3),
        )
        paths = torch.tensor([[[2, -1, 5], [-1, -1, 5], [5, 5, 5]]])
        args = torch.randn(1, 3, 5), paths, words(2, 9, 5, 5), ints(4), ints(1), given
        options = {"token_ids": few, "allowed": torch.full((1, 3, 1), -2, dtype=torch.int32)}
        same(*(adjust_logits(*args, **options, backend=name) for name in (backend, "reference")))


def test_float64_is_the_reference_s():
    args, options = case(6)
    z = args[0].double()
    have = adjust_logits(z, *args[1:], **options)
    assert have.dtype == torch.float64
    torch.testing.assert_close(have.float(), by_loops(*args, **options), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_bad_input():
    given, z, paths = Adjustments.of(2), torch.randn(2, 3, 40), torch.zeros(2, 3, 1).long()
    text, two = torch.zeros(2, 5).long(), ints(1, 1)
    good = (z, paths, text, two, two, given)

    def but(at: int, value: object) -> tuple:
        return *good[:at], value, *good[at + 1 :]

    def setting(name: str, value: object) -> tuple:
        return but(5, given._replace(**{name: value}))

    for arguments, error in [
        (but(0, z.int()), TypeError),
        (but(0, z[0]), ValueError),
        (but(0, z[..., :0]), ValueError),
        (but(1, paths.int()), TypeError),
        (but(1, paths[:, :1]), ValueError),
        (but(2, text[:1]), ValueError),
        (but(3, two.long()), TypeError),
        (but(4, two[:1]), ValueError),
        (but(5, tuple(given)), TypeError),
        (setting("added", torch.zeros(2, 41)), ValueError),
        (setting("first", torch.zeros(2, 40)), TypeError),
        (setting("phrases", torch.zeros(2, 2).long()), ValueError),
        (setting("repetition", torch.ones(3)), ValueError),
        (setting("ngram", torch.ones(2)), TypeError),
    ]:
        with pytest.raises(error, match="adjust_logits: .*allowed"):
            adjust_logits(*arguments)
    for options in (
        {"token_ids": torch.arange(39)},
        {"allowed": torch.zeros(2, 3, 1, dtype=torch.int32)},
        {"allowed": torch.zeros(2, 1, 2, dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match="adjust_logits: .*allowed"):
            adjust_logits(*good, **options)


@pytest.mark.parametrize(
    "name, value",
    [
        *[("repetition", value) for value in (0.0, -1.0, INF, math.nan)],
        *[("frequency", value) for value in (INF, math.nan)],
        *[("presence", -INF), ("ngram", -1), ("ngram", 2**31)],
        *[("phrases", [phrase]) for phrase in (([], 1.0), ([-1, 2], 1.0), ([1], math.nan), ([1], 1.0, 2))],
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match="; allowed: "):
        Adjustments.of(2, **{name: value})


def test_opcheck_and_compile():
    for seed in (6, 7, 8):
        args, options = case(seed)
        args = args[0].nan_to_num(posinf=9.0), *args[1:]  # opcheck takes no NaN for another
        flat = (*args[:5], *args[5], options["token_ids"], options["allowed"])
        for backend in HERE:
            torch.library.opcheck(torch.ops.beagle.adjust_logits, (*flat, backend))
    compiled = torch.compile(adjust_logits, fullgraph=True, backend="aot_eager")
    same(compiled(*args, **options), adjust_logits(*args, **options))
