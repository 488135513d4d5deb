"""The prefill of a chat's later turns: python -m bench.answers.chat_turns --help

Chats of four turns, whose questions are prompts of MT-Bench, HumanEval and GSM8K of about --lengths tokens, each length
at each place of a chat as often as at another; the target answers each greedily before the next is asked. Three ways
prefill each later turn, one after another in an order that turns, --repeats times:

- reused: an engine that holds the chat so far, which runs the new tokens alone;
- whole: an engine that has forgotten it and runs all of the prompt;
- alone: the new tokens as a prompt of their own, which is what reuse could cost at best.

Seconds are those of the report's prefill; buffers have grown before. A turn's ratio is the median of its repeats', and
a row has the spread over turns. Both engines' answers are compared; where they part, `lossless` tells a tie from a
fault, and with a fault nothing is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from beagle_sd.data.chats import encode_turns
from beagle_sd.data.evaluation_sets import evaluation_prompts
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import Generated, generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_bundled
from bench.answers.acceptance import described
from bench.answers.lossless import Agreement
from bench.answers.vllm import until_end
from bench.engines.comparison import spread
from bench.environment import machine

SETS = ("mt-bench", "humaneval", "gsm8k")
LENGTHS = [50, 100, 200, 350]
WAYS = ("reused", "whole", "alone")
Chat = list[tuple[int, list[int]]]
"""Its turns: about how long the question is, and the ids before its answer and behind the one before."""


@dataclass
class Turn:
    """A later turn: about how long its question is, tokens held before it and new ones, milliseconds of the prefill by
    way, a value a repeat."""

    length: int
    held: int
    new: int
    ms: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratio(self, way: str) -> float:
        """Of the reused prefill over another's, the median of the repeats'."""
        return median(own / other for own, other in zip(self.ms["reused"], self.ms[way], strict=True))


def questions(tokenizer, lengths: Sequence[int], count: int, folder: Path | None = None) -> dict[int, list[str]]:
    """Length -> the `count` questions whose tokens are nearest to it, none for two lengths."""
    texts = [one["turns"][0] for name in SETS for one in evaluation_prompts(name, folder, download=folder is None)]
    sizes = {text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts}
    found = {}
    for length in sorted(lengths, reverse=True):  # of long ones there are few
        found[length] = sorted(sizes, key=lambda text: abs(sizes[text] - length))[:count]
        for text in found[length]:
            del sizes[text]
    return found


def chats(tokenizer, lengths: Sequence[int], count: int, folder: Path | None = None) -> list[Chat]:
    """`count` chats of one turn a length, each beginning with another."""
    asked = questions(tokenizer, lengths, count, folder)
    found = []
    for number in range(count):
        order = [lengths[(number + place) % len(lengths)] for place in range(len(lengths))]
        turns = [{"role": "user", "content": asked[length][number]} for length in order]
        found.append([*zip(order, encode_turns(tokenizer, turns), strict=True)])
    return found


class Player:
    """Plays chats on an engine that holds what was said, beside one that does not and one for the new tokens alone."""

    def __init__(self, target, draft, capacity: int, max_new_tokens: int, tree: TreeShape):
        self.target, self.draft, self.max_new_tokens = target, draft, max_new_tokens
        self.engines = {way: Engine(target, draft, batch=1, capacity=capacity, tree=tree) for way in WAYS}
        self.ends, self.agreement, self.answers = end_tokens(target), Agreement(), 0
        for way in WAYS:
            self._written(way, [1] * (capacity - 1), 1)  # buffers grow

    def _written(self, way: str, ids: list[int], most: int) -> Generated:
        given = torch.tensor([ids])
        return generate(self.target, self.draft, given, max_new_tokens=most, engine=self.engines[way])

    def play(self, chat: Chat, repeat: int) -> list[Turn]:
        """The later turns of a chat, each with one value a way."""
        self.engines["reused"].forget()
        text: list[int] = []
        found = []
        for place, (length, part) in enumerate(chat):
            prompt = text + part
            ways = [WAYS[(repeat + place + step) % len(WAYS)] for step in range(len(WAYS))] if place else ["reused"]
            reused = self.engines["reused"]
            held = reused.common(reused.held([0])[0], prompt)
            turn, answers = Turn(length, held, len(prompt) - held), {}
            for way in ways:
                answers[way] = self._answer(way, prompt, turn)
            if place:
                found.append(turn)
                self.answers += 1
                self.agreement.add(self.target, prompt, answers["reused"], answers["whole"], 0.0, 0)
            said = answers["reused"]
            text = prompt + (said[:-1] if said[-1] in self.ends else said)
        return found

    def _answer(self, way: str, prompt: list[int], turn: Turn) -> list[int]:
        ids, most = (prompt[turn.held :], 1) if way == "alone" else (prompt, self.max_new_tokens)
        if way != "reused":
            self.engines[way].forget()
        made = self._written(way, ids, most)
        wanted = turn.new if way != "whole" else len(prompt)
        if made.report.prefilled != wanted:
            raise SystemExit(f"{way}: {made.report.prefilled} tokens were prefilled; {wanted} were to be")
        turn.ms[way].append(1e3 * made.report.seconds["prefill"])
        return until_end(made.sequences[0, len(ids) :].tolist(), self.ends)


def row_of(length: int | None, turns: Sequence[Turn]) -> dict:
    """The turns of about a length (None: all): medians, the ratio to the new tokens alone, of the time of the whole
    prompt the share saved. at_most: `bound` from above."""
    over = [turn.ratio("alone") for turn in turns]
    below = spread([-ratio for ratio in over])["bound"]
    return {
        "length": length,
        "turns": len(turns),
        "held": round(median(turn.held for turn in turns)),
        "new": round(median(turn.new for turn in turns)),
        **{f"{way}_ms": round(median(median(turn.ms[way]) for turn in turns), 2) for way in WAYS},
        "over_alone": spread(over) | {"at_most": None if below is None else -below},
        "saved": spread([1 - turn.ratio("whole") for turn in turns]),
    }


def measured(player: Player, played: Sequence[Chat], repeats: int) -> list[Turn]:
    """Every later turn of the chats with its repeats; SystemExit where answers differ beyond a tie."""
    found: list[Turn] = []
    for number, chat in enumerate(played):
        turns = player.play(chat, 0)
        for repeat in range(1, repeats):
            for turn, again in zip(turns, player.play(chat, repeat), strict=True):
                if (turn.held, turn.new) != (again.held, again.new):
                    raise SystemExit(f"chat {number}: another text when it was played again")
                for way in WAYS:
                    turn.ms[way] += again.ms[way]
        found += turns
        print(f"chat {number}: {[round(turn.ratio('alone'), 2) for turn in turns]} of the new tokens alone", flush=True)
        if player.agreement.faults:
            raise SystemExit("faults: an answer with reuse differs from a fresh engine's beyond a tie")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.chat_turns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=8, help="chats")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the questions, about")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="of each chat")
    parser.add_argument("--tree", type=TreeShape.parse, default=TreeShape(4, 4, 8), help="depth,branch,num_nodes")
    parser.add_argument("--folder", type=Path, help="where the sets are; default: the cache, downloaded if need be")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    target, tokenizer, draft = load_bundled(device="cpu")
    played = chats(tokenizer, args.lengths, args.count, args.folder)
    longest = max(sum(len(part) + args.max_new_tokens for _, part in chat) for chat in played)
    player = Player(target, draft, longest, args.max_new_tokens, args.tree)
    turns = measured(player, played, args.repeats)
    rows = [row_of(length, [turn for turn in turns if turn.length == length]) for length in sorted(args.lengths)]
    rows.append(row_of(None, turns))
    print(*map(json.dumps, rows), sep="\n")
    args.seed = 0  # which greedy answers do not look at
    header = described("smollm2-135m", ", ".join(SETS), len(played), target, args) | machine()
    settings = {"tree": str(args.tree), "repeats": args.repeats, "answers": player.answers}
    write_json(args.out, header | settings | {"ties": player.agreement.ties, "rows": rows})


if __name__ == "__main__":
    main()
