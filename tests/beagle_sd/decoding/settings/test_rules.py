"""Rules of our own: the text does not depend on the draft, which leans as the text does."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import NEW, odd_one, prompts, ragged
from models import VOCAB, agreeable_target, small_draft
from round_cases import TREE

from beagle_sd import TreeShape, generate

TREES = [TREE, pytest.param(TreeShape(3, 1, 4), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def pair():
    target = agreeable_target()
    return target, small_draft(target)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize(
    "rules",
    [
        {"frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"frequency_penalty": -0.4, "no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 2.0, "logits_processor": [odd_one]},
        {"sequence_bias": {(4, 5): 9.0, (5, 4): 9.0, (3,): -2.0}, "bad_words_ids": [[4, 5, 4], [6]]},
        {"not_before": {3: 5, 4: 9}, "min_new_tokens": 4, "eos_token_id": [7, 8, 9]},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_of_ours_do_not_depend_on_the_draft(pair, rules, tree, temperature):
    target, draft = pair
    ids, mask = ragged("right")
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3, **rules}
    plain = generate(target, None, ids, mask, **settings)
    assert torch.equal(generate(target, draft, ids, mask, **settings, tree=tree).sequences, plain.sequences)
    without = generate(target, None, ids, mask, max_new_tokens=NEW, temperature=temperature, seed=3)
    assert plain.sequences.shape != without.sequences.shape or not torch.equal(plain.sequences, without.sequences)


def test_frequency_and_presence_are_taken_off_by_what_was_written(pair):
    """Against a loop over the model's own logits."""
    target, draft = pair
    ids = prompts(1)
    made = generate(target, draft, ids, max_new_tokens=24, frequency_penalty=1.1, presence_penalty=0.6, tree=TREE)
    text, counts = ids, torch.zeros(VOCAB)
    with torch.no_grad():
        for _ in range(24):
            logits = target(text).logits[0, -1] - 1.1 * counts - 0.6 * (counts > 0)
            token = logits.argmax()
            counts[token] += 1
            text = torch.cat([text, token.view(1, 1)], 1)
    assert torch.equal(made.sequences, text)


def test_the_draft_leans_as_the_text_does(pair):
    """Where rules forbid what it would draft, it drafts something else: so much is accepted with them as without."""
    target, draft = pair
    ids = prompts(4)
    free = generate(target, draft, ids, max_new_tokens=64, tree=TREE).report.tokens_per_round
    for rules in ({"no_repeat_ngram_size": 1}, {"logits_processor": [odd_one]}, {"repetition_penalty": 1.5}):
        made = generate(target, draft, ids, max_new_tokens=64, tree=TREE, **rules)
        assert made.report.tokens_per_round > 0.75 * free, rules


def test_a_processor_that_keeps_a_state_is_refused(pair):
    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores - self.calls

    class Once:
        def __call__(self, input_ids, scores):
            if getattr(self, "seen", input_ids.shape[1]) > input_ids.shape[1]:
                raise IndexError("backwards")
            self.seen = input_ids.shape[1]
            return scores

    with pytest.raises(ValueError, match="Counting keeps a state from call to call; allowed: functions of"):
        generate(*pair, prompts(1), max_new_tokens=4, logits_processor=[Counting()])
    with pytest.raises(ValueError, match=r"Once cannot be asked of a text twice \(IndexError: backwards\)"):
        generate(*pair, prompts(1), max_new_tokens=4, logits_processor=[Once()])
