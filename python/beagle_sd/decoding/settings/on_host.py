"""Logits processors that are not known here: each node of a tree is a row to them, with its own text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from beagle_sd.decoding.settings.rules import Rules
    from beagle_sd.decoding.settings.shaping import Slot


def processed(
    scores: Tensor, paths: Tensor, slots: Sequence[Slot | None], token_ids: Tensor | None, vocab_size: int
) -> Tensor:
    """Scores [B, N, V'] after the processors of each row, for nodes with the tokens of paths [B, N, P] below the text.

    Nodes whose texts are as long go through a processor together, as rows [n, T] and [n, V]; where only some tokens
    `token_ids` [V'] have scores, the others' are -inf.
    """
    groups: dict[tuple[int, int], list[tuple[int, int, list[int]]]] = {}
    for row, (slot, below) in enumerate(zip(slots, paths.tolist(), strict=True)):
        if slot is not None and slot.rules.processors:
            for node, path in enumerate(below):
                text = slot.shown + slot.new + [token for token in path if token >= 0]
                groups.setdefault((id(slot.rules.processors), len(text)), []).append((row, node, text))
    made = scores.clone()
    for members in groups.values():
        rows, nodes = (torch.tensor(one, device=scores.device) for one in list(zip(*members, strict=True))[:2])
        texts = torch.tensor([text for *_, text in members], device=scores.device)
        given = scores[rows, nodes]
        if token_ids is not None:
            whole = given.new_full((len(given), vocab_size), -torch.inf)
            whole[:, token_ids] = given
            given = whole
        slot = slots[members[0][0]]
        assert slot is not None
        for processor in slot.rules.processors:
            given = processor(texts, given)
        made[rows, nodes] = (given if token_ids is None else given[:, token_ids]).to(made.dtype)
    return made


def check_processors(rules: Rules, ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
    """ValueError for a processor that says something else of the same text after it was asked of another: it keeps a
    state of the text from call to call, as plain decoding goes, and a tree has many texts."""
    if not rules.processors:
        return
    text = torch.tensor([[*ids]], device=device)
    scores = torch.linspace(-4.0, 4.0, vocab_size, device=device)[None]
    longer = torch.cat([text, text[:, :1]], 1)
    for processor in rules.processors:
        try:
            first, _, again = (processor(one, scores.clone()) for one in (text, longer, text))
            same = torch.equal(first.nan_to_num(), again.nan_to_num())
        except Exception as error:
            raise ValueError(
                f"{type(processor).__name__} cannot be asked of a text twice ({type(error).__name__}: {error}); "
                "allowed: functions of the tokens and scores they are given"
            ) from error
        if not same:
            raise ValueError(
                f"{type(processor).__name__} keeps a state from call to call; allowed: functions of the tokens and "
                "scores they are given"
            )
