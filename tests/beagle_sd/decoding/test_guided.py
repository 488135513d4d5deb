"""A guide at every node of a tree: the text is that of plain decoding under the same guide."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import prompts
from guide_cases import ListedGuide
from models import VOCAB, agreeable_target, small_draft
from transformers import LogitsProcessorList

from beagle_sd import Request, TreeShape, custom_generate, generate, generate_many

TREES = {"tree": TreeShape(4, 4, 16), "chain": TreeShape(3, 1, 4), "with a lookup branch": TreeShape(2, 2, 12, 10)}
END = 5


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


def listed(seed: int, count: int = 40) -> ListedGuide:
    """Texts that begin alike, with a stretch in the middle where there is no choice."""
    gen = torch.Generator().manual_seed(seed)
    stretch = torch.randint(6, VOCAB, (9,), generator=gen).tolist()
    tails = torch.randint(6, 30, (count, 6), generator=gen).tolist()
    return ListedGuide(
        [tail[:3] + stretch + tail[3 : 3 + number % 4] for number, tail in enumerate(tails)], VOCAB, [END]
    )


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_text_is_that_of_plain_guided_decoding(pair, tree, temperature, batch):
    target, draft = pair
    guides = [listed(row % 3) for row in range(batch)]
    ids = prompts(batch)
    settings = {"max_new_tokens": 24, "temperature": temperature, "seed": 2, "eos_token_id": END, "guide": guides}
    plain = generate(target, None, ids, **settings)
    made = generate(target, draft, ids, **settings, tree=TREES[tree])
    assert torch.equal(made.sequences, plain.sequences) and made.report.on_host
    for row, guide in zip(made.sequences[:, 11:].tolist(), guides, strict=True):
        assert row[: row.index(END)] in guide.texts
    assert made.report.tokens_per_round > plain.report.tokens_per_round == 1.0


def masked_by(guide: ListedGuide, width: int):
    """The same as a logits processor, as plain decoding needs it."""

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        made = torch.full_like(scores, -torch.inf)
        for text, before, after in zip(input_ids.tolist(), scores, made, strict=True):
            walk, mask = guide.begin(), torch.zeros(1, (VOCAB + 31) // 32, dtype=torch.int32)
            walk.masks([text[width:]], mask)
            allowed = (mask[0, torch.arange(VOCAB) // 32] >> torch.arange(VOCAB) % 32 & 1).bool()
            after[allowed] = before[allowed]
        return made

    return process


def test_it_is_what_transformers_writes_with_the_same_masks(pair):
    target, draft = pair
    guide, ids = listed(1), prompts(4)
    given = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": END, "pad_token_id": END}
    processors = LogitsProcessorList([masked_by(guide, 11)])
    want = target.generate(ids, **given, logits_processor=processors)
    made = generate(target, draft, ids, max_new_tokens=24, eos_token_id=END, guide=guide, tree=TREES["tree"])
    assert torch.equal(made.sequences, want)
    by = custom_generate(draft, tree=TREES["tree"])
    assert torch.equal(target.generate(ids, **given, logits_processor=processors, custom_generate=by), want)


def test_forced_tokens_cost_no_forward_beyond_the_tree(pair):
    """Nine tokens without a choice are deeper than the draft drafts: with a branch as deep they come in one round."""
    target, draft = pair
    guide, ids = ListedGuide([[7, *range(20, 29), 8]], VOCAB, [END]), prompts(1)
    settings = {"max_new_tokens": 24, "eos_token_id": END, "guide": guide}
    made = generate(target, draft, ids, **settings, tree=TreeShape(1, 1, 16, 12))
    assert made.sequences[0, 11:].tolist() == [7, *range(20, 29), 8, END]
    assert made.report.rounds == 1, "the first token is the prefill's"
    shallow = generate(target, draft, ids, **settings, tree=TreeShape(3, 1, 4))
    assert torch.equal(shallow.sequences, made.sequences) and shallow.report.rounds == 3


def test_requests_have_guides_of_their_own(pair):
    target, draft = pair
    guides = [listed(0), None, listed(2), listed(1)]
    ends = {"eos_token_id": END}
    want = [
        generate(target, None, prompts(1, 9, seed), max_new_tokens=20, guide=guide, **ends).sequences[0, 9:].tolist()
        for seed, guide in enumerate(guides)
    ]
    requests = [
        Request(prompts(1, 9, seed), key=seed, max_new_tokens=20, guide=guide) for seed, guide in enumerate(guides)
    ]
    found = generate_many(target, draft, requests, batch=2, tree=TREES["tree"], **ends)
    assert {one.request.key: one.tokens.tolist() for one in found} == dict(enumerate(want))


def test_a_guide_with_rules_beside_it(pair):
    """They act first, and what the guide forbids does not come for any bias."""
    target, draft = pair
    guide, ids = listed(1), prompts(4)
    rules = {"logit_bias": {40: 90.0, END: -2.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
    settings = {"max_new_tokens": 24, "eos_token_id": END, "guide": guide, "temperature": 0.8, **rules}
    plain = generate(target, None, ids, **settings)
    assert torch.equal(generate(target, draft, ids, **settings, tree=TREES["tree"]).sequences, plain.sequences)
    for row in plain.sequences[:, 11:].tolist():
        assert row[: row.index(END)] in guide.texts


def test_what_does_not_fit_is_named(pair):
    guide = listed(1)
    with pytest.raises(
        ValueError, match=r"ends a text with \[5\], and the call's end tokens are \[7\]; allowed: a guide"
    ):
        generate(*pair, prompts(1), eos_token_id=7, guide=guide)
    with pytest.raises(ValueError, match="2 guides were given for 3 rows; allowed: one, or one a row"):
        generate(*pair, prompts(3), eos_token_id=END, guide=[guide, guide])
