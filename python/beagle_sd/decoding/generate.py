"""Speculative decoding as one call: draft a tree, let the target verify it at once, keep what it would have said."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from beagle_kernels import Sampling
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.loop import Decoding, Row
from beagle_sd.decoding.prompts import Text
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.settings.on_host import check_processors
from beagle_sd.decoding.settings.rules import RuleArguments, Rules, check_names, rules_of
from beagle_sd.decoding.settings.stopping import Stopping
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.ends import end_tokens, named_tokens, token_ids
from beagle_sd.models.pictures import PicturePrompt, checked_inputs
from beagle_sd.models.target import Target


@dataclass
class Generated:
    """sequences [B, prompt + new] int64: the prompt as given, then the new tokens, padded with pad_token_id.

    If asked for: logprobs [B, new] f32 of the new tokens, padded with 0; top_tokens [B, new, k] int64 and top_logprobs
    [B, new, k] f32, the target's k best in each new token's place, best first, padded with 0; prompt_logprobs
    [B, prompt] f32 of the prompt's tokens, 0 for each row's first, and padding.
    """

    sequences: Tensor
    report: Report
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None
    prompt_logprobs: Tensor | None = None


if TYPE_CHECKING:
    from typing_extensions import Unpack

_Call = TypeVar("_Call", bound=Callable)


def ends_its_streamer(call: _Call) -> _Call:
    """Tell the keyword `streamer` the end even where `call` fails: whoever reads from it would wait for ever."""

    @functools.wraps(call)
    def ending(*args, streamer: BaseStreamer | None = None, **settings):
        try:
            return call(*args, streamer=streamer, **settings)
        except BaseException:
            if streamer is not None:
                with suppress(Exception):
                    streamer.end()
            raise

    return ending  # type: ignore[return-value]


@ends_its_streamer
def generate(
    target: PreTrainedModel,
    draft: BeagleDraft | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    model_inputs: Mapping[str, Any] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    tree: TreeShape | AdaptiveTree | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    graph: bool | None = None,
    page_size: int | None = None,
    engine: Engine | None = None,
    **rules: Unpack[RuleArguments],
) -> Generated:
    """Decode speculatively: the tokens are those of plain decoding with the same seed, whatever the draft does.

    input_ids [B, T] int64, padded on either side with attention_mask [B, T]; model_inputs: what the model takes beside
    them for the prompt, as its processor gives it (pixel_values, image_grid_thw, token_type_ids ...): such a prompt is
    run by the model's own forward, all at once, and its keys and values take their memory twice for a moment. draft
    None decodes plainly, with the same sampler. temperature 0 is greedy. An int seed s means s + b for row b, a tensor
    [B] is taken as it is. tree: every round's TreeShape, or an AdaptiveTree, which chooses each round's; None: the
    device's default. Draft and tree decide the speed alone.

    rules: what is done to the logits before temperature and filters, by the text before each token: logit_bias,
    sequence_bias, bad_words_ids, repetition_penalty, frequency_penalty, presence_penalty, min_new_tokens, not_before,
    no_repeat_ngram_size, guide, logits_processor, as RuleArguments says.

    eos_token_id None takes the target's generation config's; an empty list never stops early. streamer (one row only)
    is given the prompt, then each round's tokens, and its end even where the call fails. stopping_criteria are asked
    after each token with the prompts as given and the new tokens behind them [B, T + new], ended rows padded, and no
    scores: a row ends with the first token at which one says so. return_logprobs gives log softmax of the target's own
    logits for each new token, at temperature 1, with nothing done to them: what scoring the text would give, so that
    calls with different settings compare, and no emitted token is at -inf; top_logprobs the k best of them in its
    place; prompt_logprobs those of the prompt's own tokens.

    On CUDA each round is one graph's replay (graph=False: eagerly); page_size keeps the target's cache in pages. An
    engine keeps buffers and graphs from call to call, and the keys of the texts it holds: of a prompt that begins as
    one of them only what is new is run. What shapes it (tree, return_logprobs, top_logprobs, graph, page_size) is then
    given to it, not here.

    Raises ValueError for bad arguments, for targets or drafts that do not fit, and where the request does not fit the
    engine; TypeError for a tree that is none; RuntimeError where the target gives a row no finite logit; GraphError
    where a round cannot be captured.
    Paper: section 3.4; docs/design.md: A round of decoding.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: at least 1")
    wrapped = checked_target(target)
    target = wrapped.model
    check_names("generate", rules)
    options: dict[str, Any] = {
        "tree": tree,
        "graph": graph,
        "page_size": page_size,
        "return_logprobs": return_logprobs,
        "top_logprobs": top_logprobs,
    }
    check_engine(engine, wrapped, draft, options)
    if prompt_logprobs and engine is not None and engine.buffers.kept.logprobs is None:
        raise ValueError(
            "prompt_logprobs given with an engine without room for them; allowed: return_logprobs=True there"
        )
    beside = checked_inputs(wrapped, model_inputs)
    if beside and prompt_logprobs:
        raise ValueError("prompt_logprobs given with model_inputs; allowed: for prompts of text alone")
    prompts, lengths = _prompts(input_ids, attention_mask, wrapped, named_tokens(wrapped.model) if beside else [])
    wrapped.check_length(int(lengths.min()), prompts.shape[1] + max_new_tokens)
    pictures = PicturePrompt.of(wrapped, input_ids, attention_mask, beside) if beside else None
    sampling = Sampling.of(len(prompts), seed, temperature, top_k, top_p, min_p)
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"a streamer was given with {len(prompts)} rows; allowed: 1 row")
    ends, pad = ends_of(target, eos_token_id, pad_token_id)
    made = rules_of(wrapped.config.vocab_size, ends, len(prompts), **rules)
    for row, rules_of_row in enumerate(made):
        if row == 0 or rules_of_row.processors is not made[0].processors:
            check_processors(rules_of_row, input_ids[row].tolist(), wrapped.config.vocab_size, wrapped.device)
    texts = _texts(input_ids, prompts, lengths, sampling, max_new_tokens, made)
    options["return_logprobs"] |= prompt_logprobs

    def decode() -> Generated:
        made = engine or Engine(target, draft, batch=len(texts), capacity=prompts.shape[1] + max_new_tokens, **options)
        decoding = Decoding(made, ends, host_decides=bool(stopping_criteria))
        rows = [Row(text, f"row {number}") for number, text in enumerate(texts)]
        stopping = Stopping(stopping_criteria, input_ids.to(wrapped.device), pad, decoding, rows)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        decoding.admit(rows, pictures, echo=prompt_logprobs)
        while True:
            stopping.ask()
            if streamer is not None and (run := rows[0].take_run()):
                streamer.put(torch.tensor(run))
            if not decoding.live:
                break
            decoding.step()
        if streamer is not None:
            streamer.end()
        if engine is None:
            made.settle()
        return _generated(input_ids, attention_mask, decoding, rows, pad, prompt_logprobs)

    try:
        return decode()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they would hold the buffers for as long as the error lives
        raise


def _generated(
    input_ids: Tensor, mask: Tensor | None, decoding: Decoding, rows: Sequence[Row], pad: int, echo: bool
) -> Generated:
    new = [torch.tensor(row.tokens) for row in rows]
    longest = max(map(len, new))
    made = Generated(torch.cat([input_ids, _stacked(new, longest, pad).to(input_ids)], 1), decoding.report())
    for name in ("logprobs", "top_tokens", "top_logprobs"):
        kept = [decoding.kept(row, name) for row in rows]
        values = [one[len(row.text.ids) :] for one, row in zip(kept, rows, strict=True) if one is not None]
        setattr(made, name, _stacked(values, longest, 0) if values else None)
    if echo:
        made.prompt_logprobs = torch.zeros(input_ids.shape, device=decoding.engine.target.device)
        for row, (text, echoed) in enumerate(zip(rows, made.prompt_logprobs, strict=True)):
            seen = slice(None) if mask is None else mask[row].to(echoed.device) != 0
            scored = decoding.kept(text, "logprobs")
            assert scored is not None
            told = scored[: len(text.text.ids)].clone()
            told[0] = 0.0  # nothing stands before it
            echoed[seen] = told
    return made


def _stacked(rows: Sequence[Tensor], longest: int, padding: float) -> Tensor:
    """Rows [n, ...] padded to [B, longest, ...]."""
    made = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), padding)
    for values, row in zip(made, rows, strict=True):
        values[: len(row)] = row
    return made


def _texts(
    input_ids: Tensor,
    prompts: Tensor,
    lengths: Tensor,
    sampling: Sampling,
    max_new_tokens: int,
    rules: Sequence[Rules],
) -> list[Text]:
    shown, ids = input_ids.tolist(), prompts.tolist()
    return [
        Text(
            ids[row][:length],
            max_new_tokens,
            Sampling(*(field[row : row + 1] for field in sampling)),
            rules[row],
            shown[row],
        )
        for row, length in enumerate(lengths.tolist())
    ]


def checked_target(model: PreTrainedModel) -> Target:
    """The target, if it is one that decodes; ValueError otherwise."""
    target = Target(model)
    if target.model.training:
        raise ValueError(
            "the target is in training mode, where dropout makes its tokens random; allowed: target.eval()"
        )
    return target


_UNSET = {"return_logprobs": False, "top_logprobs": 0}
"""Of an engine's options, those that are not None where they are not given."""


def check_engine(engine: Engine | None, target: Target, draft: BeagleDraft | None, options: dict) -> None:
    """ValueError where an engine is another's, or options were given that it has itself."""
    if engine is None:
        return
    if engine.model is not target.model or engine.draft is not draft:
        raise ValueError("the engine was made for another target or draft; allowed: the same two objects")
    if given := [name for name, value in options.items() if value != _UNSET.get(name)]:
        raise ValueError(f"{', '.join(given)} given with an engine; allowed: give them to Engine")


def _prompts(
    input_ids: Tensor, attention_mask: Tensor | None, target: Target, placeholders: list[int]
) -> tuple[Tensor, Tensor]:
    """The prompts moved to the left [B, T] and their lengths int32 [B]; placeholders may lie outside the vocabulary."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {given}; allowed: an integer tensor [B, T]")
    ids = input_ids.to(target.device, torch.int64)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; allowed: that of input_ids, {tuple(ids.shape)}"
        )
    mask = mask != 0
    lengths = mask.sum(1)
    if ids.numel() == 0 or not bool((lengths > 0).all()):
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"input_ids {tuple(ids.shape)} has an empty prompt (rows {empty}); allowed: a token or more")
    if bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > 1).any()) or bool((~mask[:, 0] & ~mask[:, -1]).any()):
        raise ValueError("attention_mask has a gap; allowed: padding at one side of each row")
    vocab = target.config.vocab_size
    outside = mask & ((ids < 0) | (ids >= vocab))
    if bool(outside.any()) and (wrong := set(ids[outside].tolist()).difference(placeholders)):
        raise ValueError(f"input_ids has {min(wrong)}; allowed: 0 to {vocab - 1}")
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices
    kept = torch.where(mask.gather(1, order), ids.gather(1, order), 0)
    return kept[:, : int(lengths.max())], lengths.to(torch.int32)


def ends_of(target: PreTrainedModel, eos_token_id, pad_token_id) -> tuple[list[int], int]:
    config = target.generation_config
    ends = end_tokens(target) if eos_token_id is None else token_ids(eos_token_id)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    return ends, pad_token_id
