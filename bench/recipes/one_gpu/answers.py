"""The part `answers`: the target answers every prompt at every temperature."""

from __future__ import annotations

from pathlib import Path

import torch

from beagle_sd.data.answers import requests_of, write_answers
from beagle_sd.data.conversations import stored_answers, write_answer_file
from beagle_sd.data.shards import Sequence
from beagle_sd.models.ends import end_tokens
from bench.recipes.one_gpu.job import Job, OutOfTime
from bench.recipes.one_gpu.kit import load_prompts
from bench.recipes.one_gpu.recipe import Sizes
from bench.recipes.one_gpu.training import seed_all, target_of


def answers(job: Job, graph: bool = True) -> bool:
    """The target answers every prompt at every temperature, into OUT/answers/answers-NN.npz."""
    seed_all(job.device)
    sizes = job.sizes
    prompts = load_prompts(job.out.prompts_file())
    target, tokenizer = target_of(job)
    files = AnswerFiles(job.out.part("answers"), sizes, {number: name for number, (_, name) in enumerate(prompts)})
    already, began = files.tokens, job.budget.spent
    pending = (
        request
        for turn in range(len(sizes.temperatures))
        for request in requests_of(((n, ids) for n, (ids, _) in enumerate(prompts)), sizes.temperatures, turn)
        if (request.index, round(request.temperature, 3)) not in files.done
        and len(request.ids) <= sizes.max_prompt_tokens
    )
    written = write_answers(
        target,
        pending,
        ends=end_tokens(target, tokenizer),
        batch=sizes.batch,
        states=False,
        graph=graph,
        max_new_tokens=sizes.max_new_tokens,
        context=sizes.max_prompt_tokens + sizes.max_new_tokens,
    )
    finished = False
    try:
        for sequence in written:
            files.add(sequence)
            job.budget.need()
        finished = True
    except OutOfTime:
        pass
    finally:  # whatever ended it, what is written is kept
        files.save()
        spent = max(job.budget.spent - began, 1e-9)
        rate = round((files.tokens - already) / spent, 1)
        job.record(
            "answers",
            finished=finished,
            answers=len(files.done),
            answer_tokens=files.tokens,
            tokens_a_second=rate,
            graph=graph,
            batch=sizes.batch,
        )
        print(f"answers: {len(files.done)}, {files.tokens} tokens written by the target, {rate:.0f} a second now")
    return finished


class AnswerFiles:
    """answers-NN.npz, each of about so many ids; the last is written anew, whole, as it grows."""

    def __init__(self, folder: Path, sizes: Sizes, sources: dict[int, str]):
        self.folder, self.sizes, self.sources = folder, sizes, sources
        self.done: set[tuple[int, float]] = set()
        self.tokens = self.number = self.ids = self.unsaved = 0
        self.open: list[Sequence] = []
        for self.number, path in enumerate(sorted(folder.glob("answers-[0-9]*[0-9].npz"))):
            self.open, self.ids = [], 0
            for sequence in _sequences(path):
                self._take(sequence)
        self.unsaved = 0
        self._next()

    def add(self, sequence: Sequence) -> None:
        self._take(sequence)
        if self.unsaved >= self.sizes.ids_a_save or self.ids >= self.sizes.ids_a_file:
            self.save()

    def save(self) -> None:
        if self.unsaved:
            write_answer_file(self.folder / f"answers-{self.number:02d}.npz", self.open, self.sources)
            self.unsaved = 0
            self._next()

    def _take(self, sequence: Sequence) -> None:
        self.open.append(sequence)
        self.done.add((sequence.index, round(sequence.temperature, 3)))
        self.tokens += int(sequence.loss_mask.sum())
        self.ids += len(sequence.tokens) + 1
        self.unsaved += len(sequence.tokens) + 1

    def _next(self) -> None:
        """Begin another file if this one is full."""
        if self.ids >= self.sizes.ids_a_file:
            self.number, self.ids, self.open = self.number + 1, 0, []


def _sequences(path: Path) -> list[Sequence]:
    """A file's answers as the writer gave them."""
    stored = stored_answers(path)
    ids, none = torch.from_numpy(stored["ids"].astype("int64")), torch.empty(0)
    parts, masks = (all_of.split(stored["lengths"].tolist()) for all_of in (ids, torch.from_numpy(stored["learn"])))
    return [
        Sequence(part[:-1], mask[1:], none, int(part[-1]), index, temperature)
        for part, mask, index, temperature in zip(
            parts, masks, stored["index"].tolist(), stored["temperature"].tolist()
        )
    ]
