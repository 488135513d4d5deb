"""Who takes part in a comparison: a name, and how it answers one prompt after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import Generated, generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft

BASELINE = "target.generate"
PLAIN_LOOP = "beagle, plain"
_LOOKUP_TOKENS = 4
"""What prompt lookup drafts a round: more costs more than it brings on a CPU."""

Runs = Mapping[str, Callable[[Tensor], tuple[int, Report | None]]]


@dataclass
class EngineRun:
    """Beagle's loop as a contender: its engine is made and its graphs are captured with the first answer, then kept.

    draft None decodes plainly; where the tree adapts each answer begins with one that has learnt nothing yet; capacity:
    the most prompt and new tokens of an answer.
    """

    target: PreTrainedModel
    draft: BeagleDraft | None
    capacity: int
    max_new_tokens: int
    temperature: float
    tree: TreeShape | AdaptiveTree | None = None
    engine: Engine | None = None

    def __call__(self, ids: Tensor) -> tuple[int, Report]:
        """Answer ids [1, T]: how many new tokens, and the report."""
        report = self.answer(ids, self.max_new_tokens).report
        return report.new_tokens, report

    def prefill(self, ids: Tensor) -> None:
        """Run a prompt, so that what its length alone needs is compiled."""
        self.answer(ids, 1)

    @property
    def nbytes(self) -> int:
        """What the engine's buffers hold from answer to answer."""
        return self.engine.nbytes if self.engine else 0

    def answer(self, ids: Tensor, max_new_tokens: int) -> Generated:
        """The whole output for ids [1, T], of `max_new_tokens` rather than the run's own."""
        known = self.engine
        engine = known or Engine(self.target, self.draft, batch=1, capacity=self.capacity, tree=self.tree)
        if isinstance(self.tree, AdaptiveTree):
            engine.tree = self.tree.again()
        engine.forget()  # no contender has the answers before
        out = generate(
            self.target, self.draft, ids, max_new_tokens=max_new_tokens, temperature=self.temperature, engine=engine
        )
        if known is None:
            engine.capture()
            self.engine = engine
        return out


def contenders(
    target: PreTrainedModel,
    draft: BeagleDraft,
    shapes: Sequence[TreeShape],
    adaptive: AdaptiveTree,
    *,
    capacity: int,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    assistant: PreTrainedModel | None = None,
) -> Runs:
    """name -> run(input_ids [1, T]) -> (new tokens, report): BASELINE, prompt lookup, assisted generation if there is
    an assistant, Beagle's loop without a draft, with each of the shapes, and with a tree that adapts.
    capacity: prompt and new tokens that an answer may have."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    own_generate: Any = target.generate

    def theirs(**more):
        def run(ids: Tensor):
            torch.manual_seed(0)
            out = own_generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **sampling, **more
            )
            return out.shape[1] - ids.shape[1], None

        return run

    ours = partial(EngineRun, target, capacity=capacity, max_new_tokens=max_new_tokens, temperature=temperature)
    runs: dict[str, Callable[[Tensor], tuple[int, Report | None]]] = {
        BASELINE: theirs(),
        "transformers, prompt lookup": theirs(prompt_lookup_num_tokens=_LOOKUP_TOKENS),
    }
    if assistant is not None:
        runs["transformers, assisted"] = theirs(assistant_model=assistant)
    runs[PLAIN_LOOP] = ours(None)
    for shape in dict.fromkeys(shapes):
        runs[shape_name(shape)] = ours(draft, tree=shape)
    runs["beagle, adaptive tree"] = ours(draft, tree=adaptive)
    return runs


def shape_name(shape: TreeShape) -> str:
    """As a contender is called."""
    if shape.branch == 1:
        return f"beagle, chain of {shape.depth}"
    return f"beagle, tree of {shape.num_nodes} (depth {shape.depth}, branch {shape.branch})"
