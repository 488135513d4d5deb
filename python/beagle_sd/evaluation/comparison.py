"""Whole answers timed side by side: the target's own `generate`, transformers' speculation, and Beagle."""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from beagle_sd.data.chats import encode_chat
from beagle_sd.data.conversations import read_messages
from beagle_sd.data.evaluation_sets import SET_NAMES, evaluation_prompts
from beagle_sd.data.rows import read_text
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import AdaptiveTree, Costs
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.evaluation.contenders import BASELINE, PLAIN_LOOP, EngineRun, Runs, contenders, shape_name
from beagle_sd.evaluation.memory import peak_bytes
from beagle_sd.models.draft import BeagleDraft

CONFIDENCE = 0.95


class Answer(NamedTuple):
    """One answer: wall seconds, prefill included, its tokens, and what the loop reports if it is ours."""

    seconds: float
    tokens: int
    report: Report | None


@dataclass(frozen=True)
class Row:
    """A contender over all prompts. Ratios are of seconds a token, BASELINE's over its own on the same prompt.

    ms_per_token: the median; tokens_per_round: over all rounds, None where transformers does not say; low, median,
    high: the ratios' 20, 50 and 80 percentiles; bound: `lower_bound` of them; decode: its speed after the prefill over
    plain decoding in the same loop, the median; predicted: the same by tokens_per_round and calibrated costs;
    peak_bytes: the most memory while it answered the longest prompt (`warm_up`), both models' weights included.
    """

    prompts: str
    contender: str
    answers: int
    ms_per_token: float
    tokens_per_round: float | None
    low: float
    median: float
    high: float
    bound: float | None
    decode: float | None = None
    predicted: float | None = None
    peak_bytes: int | None = None


class Comparison(NamedTuple):
    """What `compare_on` measured: rows by prompts and contender, the costs it predicts from."""

    rows: list[Row]
    costs: Costs


def compare_on(
    sources: Sequence[str],
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: BeagleDraft,
    tree: AdaptiveTree,
    *,
    count: int = 20,
    raw: bool = False,
    shapes: Sequence[TreeShape] = (),
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    assistant: PreTrainedModel | None = None,
    on_progress: Callable[[str, int, int], object] | None = None,
    on_rows: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Compare on `count` prompts of each source (see `read_prompts`). shapes: which trees of fixed shape take part;
    none given, the chain and the tree that `tree` expects most of. on_progress(source, done, total) is called as it
    goes, on_rows after each prompt, with what has been measured so far."""
    sets = {source: read_prompts(source, tokenizer, count, raw) for source in dict.fromkeys(sources)}
    shapes = list(dict.fromkeys(shapes)) or [
        max(part, key=lambda shape: tree.costs.speedup(shape, tree.measured[shape]))
        for part in ([s for s in tree.measured if s.branch == 1], [s for s in tree.measured if s.branch > 1])
        if part
    ]
    longest = max(chain(*sets.values()), key=len)
    runs = contenders(
        target,
        draft,
        shapes,
        tree,
        capacity=len(longest) + max_new_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        assistant=assistant,
    )
    peaks = warm_up(runs, longest, target.device)
    _prefill_all(runs[PLAIN_LOOP], chain(*sets.values()), target.device)
    rows: list[Row] = []
    for source, prompts in sets.items():
        answers: list[dict[str, Answer]] = []
        for answer in compare(runs, prompts, target.device):
            answers.append(answer)
            if on_progress is not None:
                on_progress(source, len(answers), len(prompts))
            if on_rows is not None:
                on_rows(Comparison([*rows, *rows_of(source, answers, shapes, tree.costs, peaks)], tree.costs))
        rows += rows_of(source, answers, shapes, tree.costs, peaks)
    return Comparison(rows, tree.costs)


def warm_up(runs: Runs, prompt: Sequence[int], device: torch.device) -> dict[str, int | None]:
    """Each contender's peak memory in bytes (`beagle_sd.evaluation.memory`) while it answers `prompt` for the first
    time, without the engines of the others; the answers are not timed."""
    ids, peaks = torch.tensor([list(prompt)], device=device), {}
    for name, run in runs.items():
        peak = peak_bytes(partial(run, ids), device)
        others = sum(other.nbytes for other in runs.values() if isinstance(other, EngineRun) and other is not run)
        peaks[name] = None if peak is None else peak - others
    return peaks


def _prefill_all(run: Any, prompts: Iterable[list[int]], device: torch.device) -> None:
    """Run a prompt of every length: a GPU's kernels are compiled by length when one first comes."""
    for prompt in {len(prompt): prompt for prompt in prompts}.values():
        run.prefill(torch.tensor([prompt], device=device))


def compare(runs: Runs, prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[dict[str, Answer]]:
    """Each prompt answered by every contender, in an order that turns by one from prompt to prompt."""
    names = list(runs)
    for number, prompt in enumerate(prompts):
        ids, turn = torch.tensor([list(prompt)], device=device), number % len(names)
        answers = {}
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            tokens, report = runs[name](ids)
            answers[name] = Answer(time.perf_counter() - began, tokens, report)
        yield {name: answers[name] for name in names}


def rows_of(
    name: str,
    answers: Sequence[Mapping[str, Answer]],
    shapes: Sequence[TreeShape],
    costs: Costs,
    peaks: Mapping[str, int | None],
) -> list[Row]:
    """A row a contender, over one set of prompts called `name`; peaks are those of `warm_up`."""
    by_name = {shape_name(shape): shape for shape in shapes}
    plain = [_decode_seconds(answer[PLAIN_LOOP].report) for answer in answers]
    rows = []
    for contender in answers[0]:
        answered = [answer[contender] for answer in answers]
        ratios = sorted(
            (answer[BASELINE].seconds / answer[BASELINE].tokens) / (one.seconds / one.tokens)
            for answer, one in zip(answers, answered, strict=True)
        )
        cuts = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
        reports = [one.report for one in answered if one.report is not None]
        rounds = sum(report.row_rounds for report in reports)
        tokens = sum(report.tokens_per_round * report.row_rounds for report in reports) / rounds if rounds else None
        speeds = [before / after for before, after in zip(plain, map(_decode_seconds, reports)) if before and after]
        shape = by_name.get(contender)
        rows.append(
            Row(
                prompts=name,
                contender=contender,
                answers=len(answered),
                ms_per_token=round(statistics.median(1e3 * one.seconds / one.tokens for one in answered), 3),
                tokens_per_round=1.0 if contender == BASELINE else tokens and round(tokens, 4),
                low=round(cuts[1], 4),
                median=round(cuts[4], 4),
                high=round(cuts[7], 4),
                bound=lower_bound(ratios),
                decode=round(statistics.median(speeds), 4) if speeds else None,
                predicted=round(costs.speedup(shape, tokens), 4) if shape and tokens else None,
                peak_bytes=peaks[contender],
            )
        )
    return rows


def _decode_seconds(report: Report | None) -> float:
    """Seconds a token after the prefill and its token; 0 where there is none."""
    if report is None or report.new_tokens < 2:
        return 0.0
    return sum(took for phase, took in report.seconds.items() if phase != "prefill") / (report.new_tokens - 1)


def lower_bound(ratios: Sequence[float]) -> float | None:
    """A lower bound of the median that holds with CONFIDENCE whatever the distribution (the sign test's): the k-th
    smallest with the largest k for which k - 1 or fewer of n fair coins fall heads at most 1 - CONFIDENCE of the time.
    Of 20 ratios the 6th smallest; None for fewer than 5."""
    count, below = len(ratios), 0.0
    for k in range(count + 1):
        below += math.comb(count, k) / 2**count
        if below > 1.0 - CONFIDENCE:
            return round(sorted(ratios)[k - 1], 4) if k else None
    return None


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase, count: int, raw: bool = False) -> list[list[int]]:
    """Up to `count` prompts as the chat template's ids: the first turns of an evaluation set, spread over it, or a
    file's: .jsonl of conversations (cut after the first turn of the user), .txt of a prompt a line. raw: the last
    turn's text alone, without a template."""
    if count < 1:
        raise ValueError(f"count is {count}; allowed: 1 or more")
    if source in SET_NAMES:
        chats = [[{"role": "user", "content": prompt["turns"][0]}] for prompt in evaluation_prompts(source)]
    elif not Path(source).is_file():
        raise ValueError(
            f"{source!r} is no set of prompts and no file; allowed: {', '.join(SET_NAMES)}, or a .jsonl or .txt file"
        )
    elif Path(source).suffix == ".txt":
        lines = read_text(source).splitlines()
        chats = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    else:
        chats = [_asked(messages) for _, messages in read_messages(source)]
    if not chats:
        raise ValueError(f"{source} holds no prompt; allowed: one or more")
    spread = [chats[number * len(chats) // count] for number in range(count)] if count < len(chats) else chats
    if raw:
        return [tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"] for chat in spread]
    return [encode_chat(tokenizer, chat) for chat in spread]


def _asked(messages: list[dict]) -> list[dict]:
    """The messages up to the first that the user sends."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
    return messages[: first + 1]


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """One line a row, under the names of Row's fields."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
