"""What the answers come to: speeds, paired ratios and equal texts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from beagle_sd.evaluation.comparison import lower_bound
from bench.engines.contenders import BASELINE, OURS
from bench.engines.turns import Answer


def rows_of(prompts: str, answers: Sequence[Mapping[str, Answer]], gone: Mapping[str, str]) -> list[dict]:
    """A row a contender, over the answers to one set of prompts; one that is gone has no numbers but why.

    ms_per_token: the median, prefill included; decode_ms_per_token: the same after the first token, where the engine
    tells; equal: how many of the answers are BASELINE's token for token; over: rival -> the paired ratios of seconds a
    token (above 1: faster than the rival), for BASELINE, and of ours for every rival.
    """
    names = list(dict.fromkeys([*answers[0], *gone]))
    here = [name for name in names if name not in gone]
    rows: list[dict] = [{"prompts": prompts, "contender": name, "why": gone[name]} for name in names if name in gone]
    for name in here:
        own = [answer[name] for answer in answers]
        rivals = [each for each in here if not each.startswith(OURS)] if name.startswith(OURS) else [BASELINE]
        decode = [
            each.decode_seconds / (len(each.tokens) - 1)
            for each in own
            if each.decode_seconds is not None and len(each.tokens) > 1
        ]
        rows.append(
            {
                "prompts": prompts,
                "contender": name,
                "answers": len(own),
                "tokens": sum(len(each.tokens) for each in own),
                "ms_per_token": round(1e3 * statistics.median(map(_pace, own)), 3),
                "decode_ms_per_token": round(1e3 * statistics.median(decode), 3) if decode else None,
                "equal": sum(answer[name].tokens == answer[BASELINE].tokens for answer in answers),
                "over": {rival: ratios([answer[rival] for answer in answers], own) for rival in rivals},
            }
        )
    return sorted(rows, key=lambda row: names.index(row["contender"]))


def _pace(answer: Answer) -> float:
    return answer.seconds / len(answer.tokens)


def ratios(theirs: Sequence[Answer], own: Sequence[Answer]) -> dict[str, float | None]:
    """How many times as fast `own` is, by the same prompts, as `spread` has it."""
    return spread([_pace(their) / _pace(mine) for their, mine in zip(theirs, own, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, 20 and 80 percentiles, and `lower_bound`."""
    found = sorted(values)
    cuts = statistics.quantiles(found, n=10, method="inclusive") if len(found) > 1 else found * 9
    return {
        "low": round(cuts[1], 4),
        "median": round(cuts[4], 4),
        "high": round(cuts[7], 4),
        "bound": lower_bound(found),
    }
