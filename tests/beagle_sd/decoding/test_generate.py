"""Speculation changes nothing: every sequence equals plain decoding's, token for token."""

from __future__ import annotations

import re

import pytest
import torch
from decoding_cases import NEW, Recorder, assert_same_text, greedy, prompts, ragged
from models import ARCHITECTURES, VOCAB, agreeable_target, small_draft, small_target
from round_cases import decoded, texts

from beagle_kernels import Sampling
from beagle_sd import TreeShape, generate
from beagle_sd.decoding.engine import Engine

SHAPES = [(1, 1, 2), (4, 1, 5), (3, 2, 7), (4, 4, 16), (6, 10, 60), (5, 8, 100)]


@pytest.mark.parametrize("make", [small_target, agreeable_target])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_the_targets_own_generate(kind, make):
    target = make(kind)
    draft, ids = small_draft(target), prompts(1)
    want = greedy(target, ids, max_new_tokens=NEW)
    assert_same_text(target, generate(target, None, ids, max_new_tokens=NEW).sequences, want, 11)
    best = 0.0
    for shape in SHAPES:
        made = generate(target, draft, ids, max_new_tokens=NEW, tree=TreeShape(*shape))
        assert_same_text(target, made.sequences, want, 11)
        best = max(best, made.report.tokens_per_round)
    assert make is small_target or best > 1.5, "the draft never agreed: acceptance was not tested"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ragged_rows_are_each_decoded_as_if_alone(kind, side):
    target = agreeable_target(kind)
    draft = small_draft(target)
    ids, mask = ragged(side)
    want = torch.cat(
        [
            greedy(target, row[keep.bool()][None], max_new_tokens=NEW)[:, -NEW:]
            for row, keep in zip(ids, mask, strict=True)
        ]
    )
    for shape in [(4, 1, 5), (6, 10, 60)]:
        made = generate(target, draft, ids, mask, max_new_tokens=NEW, tree=TreeShape(*shape))
        assert torch.equal(made.sequences[:, :11], ids)
        assert torch.equal(made.sequences[:, 11:], want), shape
        assert made.report.new_tokens == 4 * NEW


@pytest.mark.parametrize("case", ["reduced vocabulary", "no states appended", "no norms", "bf16 draft"])
def test_any_draft_gives_the_same_text(case):
    target = agreeable_target()
    if case == "reduced vocabulary":
        draft = small_draft(target, draft_vocab=torch.arange(3, VOCAB, 2))
    elif case == "no states appended":
        draft = small_draft(target, append_states=False)
    elif case == "no norms":
        draft = small_draft(target, norm_query=False, norm_state=False, norm_output=False)
    else:
        draft = small_draft(target).to(torch.bfloat16)
    ids = prompts(2)
    for temperature in (0.0, 1.0):
        want = generate(target, None, ids, max_new_tokens=NEW, temperature=temperature).sequences
        for shape in [(4, 1, 5), (4, 4, 16), (5, 8, 100)]:
            made = generate(target, draft, ids, max_new_tokens=NEW, temperature=temperature, tree=TreeShape(*shape))
            assert torch.equal(made.sequences, want), (temperature, shape)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_equals_plain_sampling_with_the_same_seed(settings):
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(2)
    want = generate(target, None, ids, max_new_tokens=NEW, seed=7, **settings).sequences
    sampling = Sampling.of(2, 7, **settings)
    for shape in SHAPES:
        made = generate(target, draft, ids, max_new_tokens=NEW, seed=7, **settings, tree=TreeShape(*shape))
        assert_same_text(target, made.sequences, want, 11, sampling)
    assert made.report.tokens_per_round > 1.5
    other = generate(target, None, ids, max_new_tokens=NEW, seed=8, **settings).sequences
    assert not torch.equal(other[0], want[0]), "the seed has no effect"
    assert torch.equal(other[:1, :11], ids[:1])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sampling_does_not_depend_on_the_batch(kind):
    target = agreeable_target(kind)
    draft = small_draft(target)
    ids, mask = ragged("left")
    seeds = torch.tensor([11, -4, 2**40, 0])

    def made(rows):
        return generate(
            target,
            draft,
            ids[rows],
            mask[rows],
            max_new_tokens=NEW,
            temperature=1.0,
            top_p=0.95,
            seed=seeds[rows],
            tree=TreeShape(4, 4, 16),
        ).sequences

    together = made([0, 1, 2, 3])
    assert torch.equal(made([2, 0, 3, 1]), together[[2, 0, 3, 1]])
    for row in range(4):
        assert torch.equal(made([row])[0], together[row])
    twice = made([1, 1])
    assert torch.equal(twice[0], twice[1])


def test_an_integer_seed_counts_up_over_the_rows():
    target, ids = agreeable_target(), prompts(1).expand(3, -1)
    draft = small_draft(target)
    settings = {"max_new_tokens": NEW, "temperature": 1.0}
    counted = generate(target, draft, ids, seed=5, **settings).sequences
    assert torch.equal(counted, generate(target, draft, ids, seed=torch.tensor([5, 6, 7]), **settings).sequences)
    assert len({tuple(row) for row in counted.tolist()}) == 3


def test_sampling_follows_the_targets_distribution():
    """First tokens over many seeds, against softmax: the loop hands position and seed on as it should."""
    target, ids = small_target(), prompts(1).expand(600, -1)
    first = generate(target, None, ids, max_new_tokens=1, temperature=1.0).sequences[:, -1]
    with torch.no_grad():
        p = target(ids[:1]).logits[0, -1].softmax(-1)
    share = torch.bincount(first, minlength=VOCAB) / 600
    top = p.topk(4).indices
    assert (share[top] - p[top]).abs().max() < 4 * (0.25 / 600) ** 0.5 and share[top].max() > 0.02


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_inside_an_accepted_run(temperature):
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(4)
    settings = {"max_new_tokens": 48, "temperature": temperature, "tree": TreeShape(4, 4, 24)}
    free = generate(target, draft, ids, **settings, eos_token_id=[]).sequences[:, 11:].tolist()
    inside = set()
    for row in range(4):
        seen = Recorder()
        generate(target, draft, ids[row : row + 1], **{**settings, "seed": row}, eos_token_id=[], streamer=seen)
        inside |= {token for run in seen.runs[2:] for token in run[:-1] if token not in free[row][:3]}
    assert inside, "no run of two tokens: nothing is tested"
    lengths = lambda end: [(row.index(end) + 1) if end in row else 48 for row in free]  # noqa: E731
    end = max(inside, key=lambda token: (len(set(lengths(token))), token))
    assert len(set(lengths(end))) > 1, "all rows end together: finished rows are not tested"
    for ends in (end, [end], [end, VOCAB + 5]):
        made = generate(target, draft, ids, **settings, eos_token_id=ends, pad_token_id=96)
        want = [
            row[:length] + [96] * (max(lengths(end)) - length) for row, length in zip(free, lengths(end), strict=True)
        ]
        assert made.sequences[:, 11:].tolist() == want
        assert made.report.new_tokens == sum(lengths(end))
    target.generation_config.eos_token_id = end
    assert generate(target, draft, ids, **settings).sequences[:, 11:].tolist() == [
        [token if place < length else end for place, token in enumerate(row[: max(lengths(end))])]
        for row, length in zip(free, lengths(end), strict=True)
    ]


def test_rows_that_ended_with_a_deep_run_leave_room_for_the_others():
    """A finished row may stand `depth` slots past its end, and is drafted on while another row still decodes."""
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(12, 6)
    for depth, temperature in ((8, 0.0), (24, 0.0), (12, 1.0)):
        settings = {"max_new_tokens": 6, "temperature": temperature}
        want = generate(target, None, ids, **settings).sequences
        made = generate(target, draft, ids, **settings, tree=TreeShape(depth, 1, depth + 1))
        assert torch.equal(made.sequences, want)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 17])
def test_the_length_limit_cuts_inside_a_run(new):
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(2)
    whole = generate(target, draft, ids, max_new_tokens=40, temperature=1.0).sequences
    made = generate(target, draft, ids, max_new_tokens=new, temperature=1.0, tree=TreeShape(6, 10, 60))
    assert torch.equal(made.sequences, whole[:, : 11 + new])
    assert made.report.new_tokens == 2 * new


@pytest.mark.parametrize("shape", [(4, 1, 5), (6, 10, 60)])
def test_the_report_counts_what_the_streamer_saw(shape):
    target = agreeable_target()
    draft, ids = small_draft(target), prompts(1)
    settings = {"temperature": 1.0, "tree": TreeShape(*shape)}
    longer, seen = Recorder(), Recorder()
    generate(target, draft, ids, max_new_tokens=70, streamer=longer, **settings)
    new = sum(map(len, longer.runs[1:-4]))  # a limit that cuts no run
    made = generate(target, draft, ids, max_new_tokens=new, streamer=seen, **settings)
    prompt, first, *runs = seen.runs
    assert prompt == ids[0].tolist() and seen.ended == 1 and len(first) == 1
    assert [token for run in seen.runs for token in run] == made.sequences[0].tolist()
    report = made.report
    assert report.rounds == len(runs) and report.new_tokens == new
    assert report.tokens_per_round == pytest.approx((new - 1) / len(runs)) and report.tokens_per_round > 1.5
    reached = [sum(len(run) > depth for run in runs) for depth in range(shape[0] + 1)]
    shares = [further / before for before, further in zip(reached, reached[1:], strict=False) if before]
    assert report.acceptance_by_depth == pytest.approx(shares)
    assert set(report.seconds) == {"prefill", "draft", "target", "verify", "keep"}
    assert report.tokens_per_second > 0
    plain = generate(target, None, ids, max_new_tokens=9).report
    assert (plain.rounds, plain.tokens_per_round, plain.acceptance_by_depth) == (8, 1.0, [])


def test_prompts_of_more_than_one_prefill_chunk():
    target = agreeable_target(max_position_embeddings=2048)
    draft, ids = small_draft(target), prompts(2, 1100)
    mask = torch.ones_like(ids)
    mask[1, :500] = 0
    want = [greedy(target, row, max_new_tokens=16)[0, -16:] for row in (ids[:1], ids[1:, 500:])]
    made = generate(target, draft, ids, mask, max_new_tokens=16, tree=TreeShape(4, 4, 16))
    assert torch.equal(made.sequences[:, 1100:], torch.stack(want))


@pytest.mark.parametrize("shape", [(4, 1, 5), (6, 10, 60)])
def test_after_any_round_both_caches_hold_true_states_only(shape):
    """What compaction and the draft's appends left behind, against one plain pass over the final text."""
    target = agreeable_target("qwen3")
    draft, ids = small_draft(target), prompts(3)
    lengths = torch.tensor([11, 4, 7], dtype=torch.int32)
    engine = Engine(target, draft, batch=3, capacity=41, tree=TreeShape(*shape))
    with torch.inference_mode():
        decoding, rows = decoded(engine, texts(ids, lengths.tolist(), 30, Sampling.of(3, 3, temperature=1.0)), [])
        assert decoding.report().new_tokens == 90 and decoding.report().tokens_per_round > 1.5
    with torch.inference_mode():
        cache, draft_cache = engine.buffers.cache, engine.buffers.draft_cache
        for row, one in enumerate(sorted(rows, key=lambda one: one.slot)):
            text = torch.tensor([one.text.ids + one.tokens[:-1]])
            count = text.shape[1]
            assert int(cache.lengths[row]) == count
            plain = target(text, use_cache=True, output_hidden_states=True)
            for layer in range(2):
                for part, name in enumerate(("keys", "values")):
                    ours = cache.layer(layer)[part][row, :, :count]
                    theirs = getattr(plain.past_key_values.layers[layer], name)[0]
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            keys, values = draft.keys_values(plain.hidden_states[-1][0], torch.arange(count))
            for ours, theirs in zip((draft_cache.keys, draft_cache.values), (keys, values), strict=True):
                torch.testing.assert_close(ours[row, :, :count], theirs.transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty prompt"),
        ({"attention_mask": torch.zeros(2, 11)}, r"empty prompt \(rows \[0, 1\]\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\); allowed: that of input_ids, \(2, 11\)"),
        ({"attention_mask": torch.ones(2, 11).index_fill(1, torch.tensor([4]), 0)}, "gap"),
        ({"input_ids": torch.full((2, 11), VOCAB)}, "input_ids has 97; allowed: 0 to 96"),
        ({"input_ids": torch.full((2, 11), -1)}, "input_ids has -1"),
        ({"input_ids": torch.zeros(11, dtype=torch.int64)}, r"\(11,\); allowed"),
        ({"input_ids": [[1, 2]]}, "list; allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"seed": torch.tensor([1])}, r"seed has shape \(1,\)"),
        ({"streamer": Recorder()}, "2 rows; allowed: 1 row"),
    ],
)
def test_bad_arguments(wrong, message):
    target = small_target()
    with pytest.raises(ValueError, match=message):
        generate(target, small_draft(target), **{"input_ids": prompts(2), **wrong})


@pytest.mark.parametrize("tree", ["4,4,8", (4, 4, 8), 8])
def test_a_tree_is_a_shape_or_adapts(tree):
    target = small_target()
    for draft in (small_draft(target), None):
        with pytest.raises(TypeError, match=re.escape(f"tree is {tree!r}; allowed: a TreeShape")):
            generate(target, draft, prompts(1), tree=tree)


def test_a_target_in_training_mode_is_refused():
    target = small_target(attention_dropout=0.5)
    target.train()
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        generate(target, None, prompts(1), max_new_tokens=4)
    assert target.training


def test_a_target_without_a_finite_logit_is_named_by_its_row():
    target = small_target()
    target.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="row 0: the target gave no finite logit"):
        generate(target, None, prompts(2), max_new_tokens=4)
