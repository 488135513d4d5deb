"""Rounds that draft along the text itself (bench/answers/kinds/knowing_draft.py), for one test."""

from __future__ import annotations

from torch import Tensor

from beagle_sd.decoding import rounds
from bench.answers.kinds.knowing_draft import knowing


def know(monkeypatch, texts: list[Tensor], vocab: int, *, wrong: float = 0.25) -> None:
    """Let rounds draft along `texts`, one a row without padding; a share `wrong` of the positions has another token."""
    monkeypatch.setattr(rounds, "propose", knowing(texts, vocab, wrong))
