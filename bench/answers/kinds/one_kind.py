"""One kind of targets tried: the tokens of the tiny model's own code, greedy and sampled, or a refusal before any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from beagle_sd.decoding import rounds
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.target import Target
from bench.answers.kinds import tiny_pictures
from bench.answers.kinds.knowing_draft import knowing
from bench.answers.kinds.own_text import first_wrong, own_text, stepped_logits, whole_is_stepped, whole_logits
from bench.answers.kinds.tiny_targets import VOCAB, full_attention, tiny_target

LENGTHS = (11, 7, 5)
"""Tokens of the prompts: more than windows take (tiny_targets.REACH), and fewer."""
NEW = 20
TREE, CHAIN = TreeShape(depth=3, branch=8, num_nodes=60), TreeShape(depth=3, branch=1, num_nodes=4)
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
SEED = 7
AS_IT_COMES, FULL, PICTURED = "as it comes", "full attention", "with an image"
SAME, REFUSED, NOT_MADE, OTHER, RAISED = "same", "refused", "not made", "other tokens", "raised"
TOOK_TREE = "took a tree"
FAULTS = (OTHER, RAISED, TOOK_TREE)
VARIED = 8
"""Different tokens of a text that tells something."""
Prompts = Callable[[Sequence[int]], dict[str, Tensor]]
"""What `model.generate` is given for these rows."""


@dataclass
class Row:
    """What came of a kind; `layers` AS_IT_COMES, FULL or PICTURED; `why` is the reason given, or the error.

    varied: different tokens among the text's; tokens_per_round of the draft that knows the text; padded:
    whether a padded batch was compared; verified: as a "tree" or as a "chain", where the tokens are the same; chain:
    the target's own reason why it takes chains only.
    """

    kind: str
    layers: str
    outcome: str
    why: str = ""
    varied: int = 0
    tokens_per_round: float = 0.0
    padded: bool = False
    verified: str = ""
    chain: str = ""


class Told(BaseStreamer):
    """How many times new tokens came; a prompt comes as a batch."""

    def __init__(self) -> None:
        self.times = 0

    def put(self, value: Tensor) -> None:
        self.times += value.dim() == 1

    def end(self) -> None:
        pass


class Differs(Exception):
    """Tokens that are not the model's own."""


class TookTree(Exception):
    """A tree that was not refused, though the target takes chains only."""


def text_prompts(rows: Sequence[int]) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T] int64 of these rows of LENGTHS, padded on the left."""
    width = max(LENGTHS[row] for row in rows)
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    ids, mask = ids[list(rows), -width:], torch.ones(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : width - LENGTHS[row]] = mask[number, : width - LENGTHS[row]] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Trial:
    """A tiny model with its prompts, and how `generate` is to verify what is drafted for it."""

    model: PreTrainedModel
    prompts: Prompts
    count: int
    whole: bool
    tree: TreeShape = TREE
    told: Told = field(default_factory=Told)

    def run(self) -> tuple[float, bool]:
        """Compare each row's text alone or, where the model's own padded texts are those, the first row's and all
        rows'. The tokens a round of the draft that knows the text, and whether the rows were compared together.
        """
        everything = tuple(range(self.count))
        alone = {row: self.own((row,)) for row in everything}
        per_round = self.compared((0,), alone[0])
        batch = self.own(everything)
        padded = batch is not None and all(own is not None and own[0].equal(batch[row]) for row, own in alone.items())
        if padded:
            self.compared(everything, batch)
        else:
            for row in everything[1:]:
                if alone[row] is not None:
                    self.compared((row,), alone[row])
        return per_round, padded

    def own(self, rows: Sequence[int]) -> Tensor | None:
        """The model's own greedy text of these rows [B, NEW], None where it fails."""
        try:
            return own_text(self.model, self.prompts(rows), NEW)
        except Exception:
            return None

    def compared(self, rows: Sequence[int], want: Tensor | None) -> float:
        """Greedy beside the model's own text [B, NEW], and sampled beside what its logits choose; raises Differs.
        The tokens a round of the greedy draft that knows the text."""
        per_round = 0.0
        for settings in (GREEDY, SAMPLED):
            right = want if settings is GREEDY else None
            for name, text, tokens in self.texts(rows, settings):
                if right is None or not text.equal(right):
                    self.judge(f"{'sampled, ' if settings else ''}{name}", rows, text, settings)
                    right = text if right is None else right
                per_round = per_round if settings else tokens
        return round(per_round, 2)

    def texts(self, rows: Sequence[int], settings: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, float]]:
        """`generate` without a draft, with a fresh one, with one that knows no words but the text's, and with what is
        mostly the text itself: which it was, its new tokens [B, NEW], tokens a round."""

        def made(draft: BeagleDraft | None) -> tuple[Tensor, float]:
            found = self.generated(draft, rows, self.tree, settings)
            return found.sequences[:, -NEW:], found.report.tokens_per_round

        text, per_round = made(None)
        yield "without a draft", text, per_round
        fresh = BeagleDraft.from_target(self.model)
        yield "with a draft", *made(fresh)
        yield "with a draft of the text's words", *made(BeagleDraft.from_target(self.model, text.unique()))
        prompts = self.prompts(rows)
        kept = [ids[mask != 0] for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)]
        whole = [torch.cat([prompt, said]) for prompt, said in zip(kept, text, strict=True)]
        with mock.patch.object(rounds, "propose", knowing(whole, VOCAB)):
            yield "with a draft that knows the text", *made(fresh)

    def generated(self, draft: BeagleDraft | None, rows: Sequence[int], tree: TreeShape, settings: Mapping[str, Any]):
        """`generate` for these rows; what an image needs besides ids and mask goes as model_inputs."""
        prompts = self.prompts(rows)
        ids, mask = prompts.pop("input_ids"), prompts.pop("attention_mask")
        options: dict[str, Any] = {**settings, **({"model_inputs": prompts} if prompts else {})}
        return generate(
            self.model,
            draft,
            ids,
            mask,
            max_new_tokens=NEW,
            tree=tree,
            seed=torch.tensor([SEED + row for row in rows]),
            streamer=self.told if len(rows) == 1 else None,
            **options,
        )

    def judge(self, name: str, rows: Sequence[int], text: Tensor, settings: Mapping[str, Any]) -> None:
        """Raise Differs unless each row's text [B, NEW] is what the model's own logits of that row alone choose."""
        logits_of = whole_logits if self.whole else stepped_logits
        for number, row in enumerate(rows):
            prompts, said = self.prompts((row,)), text[number : number + 1]
            logits = logits_of(self.model, prompts, said)[0]
            begin = int(prompts["attention_mask"].sum())
            if (first := first_wrong(logits, said[0], begin, SEED + row, settings)) is not None:
                raise Differs(f"{name}, {len(rows)} rows: row {number} from new token {first} on")

    def refuse_trees(self) -> None:
        """Raise TookTree unless a tree with branches is refused before any token, with the advice to use a chain."""
        before = self.told.times
        try:
            self.generated(BeagleDraft.from_target(self.model), (0,), TREE, GREEDY)
        except ValueError as error:
            if "use a chain" in str(error) and self.told.times == before:
                return
            when = "after a token" if self.told.times > before else "without the words 'use a chain'"
            raise TookTree(f"refused {when}: {error}") from error
        raise TookTree("a tree with branches was not refused")


def varied_target(make: Callable[[int], PreTrainedModel], prompts: Prompts | None, kind: str):
    """Of a few seeds' models the first whose text has VARIED different tokens, or the most; its prompts, and that text
    [1, NEW]. prompts None: pictures."""
    best: tuple[int, PreTrainedModel, Prompts, Tensor] | None = None
    for seed in range(6):
        model = make(seed)
        given = prompts or pictured_prompts(kind, model)
        text = own_text(model, given((0,)), NEW)
        varied = len(text.unique())
        if best is None or varied > best[0]:
            best = varied, model, given, text
        if varied >= VARIED:
            break
    assert best is not None
    return best[1:]


def pictured_prompts(kind: str, model: PreTrainedModel) -> Prompts:
    """tiny_pictures.pictures; ValueError where there is none, or where other pixels make no other text."""

    def prompts(rows: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
        found = tiny_pictures.pictures(kind, model, rows, seed)
        if found is None:
            raise ValueError("no picture is made for it")
        return found

    if own_text(model, prompts((0,)), NEW).equal(own_text(model, prompts((0,), seed=1), NEW)):
        raise ValueError("its text does not depend on the picture")
    return prompts


def tried(kind: str, layers: str, overrides: dict[str, Any], tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Make the kind, let it and `generate` write. `tell` is given what stands should a step end this process."""
    tell(Row(kind, layers, NOT_MADE))
    try:
        if layers == PICTURED:
            model, prompts, want = varied_target(lambda seed: tiny_pictures.pictured_target(kind, seed), None, kind)
        else:
            model, prompts, want = varied_target(lambda seed: tiny_target(kind, seed, **overrides), text_prompts, kind)
        whole = whole_is_stepped(model, prompts((0,)), want)
    except Exception as error:
        return Row(kind, layers, NOT_MADE, said(error))
    tell(Row(kind, layers, RAISED))
    row = Row(kind, layers, SAME, varied=len(want.unique()))
    trial = Trial(model, prompts, len(tiny_pictures.TEXTS if layers == PICTURED else LENGTHS), whole)
    try:
        row.chain = chains_only(model) or ""
        trial.tree = CHAIN if row.chain else TREE
        row.tokens_per_round, row.padded = trial.run()
        if row.chain:
            trial.refuse_trees()
        row.verified = "chain" if row.chain else "tree"
    except Differs as error:
        row.outcome, row.why = OTHER, str(error)
    except TookTree as error:
        row.outcome, row.why = TOOK_TREE, str(error)
    except ValueError as error:
        clear = "allowed" in str(error) and not trial.told.times
        row.outcome, row.why = (REFUSED, str(error)) if clear else (RAISED, said(error))
    except Exception as error:
        row.outcome, row.why = RAISED, said(error)
    return row


def chains_only(model: PreTrainedModel) -> str | None:
    """The target's reason why it takes chains only; None for trees, and for what `generate` has to refuse."""
    try:
        return Target(model).chains_only
    except ValueError:
        return None


def said(error: BaseException) -> str:
    """The error's kind and its text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def rows_of(kind: str, tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The kind as it comes, with full attention in all layers where others can be made so, and with an image where it
    takes some."""
    rows = [tried(kind, AS_IT_COMES, {}, tell)]
    tell(rows[0])
    if rows[0].outcome != NOT_MADE and (overrides := full_attention(kind)):
        row = tried(kind, FULL, overrides, tell)
        tell(row)
        rows += [row] if row.outcome != NOT_MADE else []
    if kind in tiny_pictures.KINDS:
        rows.append(tried(kind, PICTURED, {}, tell))
    return rows
