"""Speculative decoding as one call: draft a tree, let the target verify it at once, keep what it would have said."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from beagle_kernels import Sampling
from beagle_sd.decoding.adaptive import AdaptiveTree
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.logits import Bias
from beagle_sd.decoding.loop import Decoding
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.ends import end_tokens, named_tokens, token_ids
from beagle_sd.models.pictures import PicturePrompt, checked_inputs
from beagle_sd.models.target import Target


@dataclass
class Generated:
    """sequences [B, prompt + new] int64: the prompt as given, then the new tokens, padded with pad_token_id; logprobs
    [B, new] f32 of the new tokens, if asked for, padded with 0."""

    sequences: Tensor
    report: Report
    logprobs: Tensor | None = None


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
    min_new_tokens: int = 0,
    logit_bias: Mapping[int, float] | Bias | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
    return_logprobs: bool = False,
    graph: bool | None = None,
    page_size: int | None = None,
    engine: Engine | None = None,
) -> Generated:
    """Decode speculatively: the tokens are those of plain decoding with the same seed, whatever the draft does.

    input_ids [B, T] int64, padded on either side with attention_mask [B, T]; model_inputs: what the model takes beside
    them for the prompt, as its processor gives it (pixel_values, image_grid_thw, token_type_ids ...): such a prompt is
    run by the model's own forward, all at once, and its keys and values take their memory twice for a moment. draft
    None decodes plainly, with the same sampler. temperature 0 is greedy. An int seed s means s + b for row b, a tensor
    [B] is taken as it is. tree: every round's TreeShape, or an AdaptiveTree, which chooses each round's; None: the
    device's default. Draft and tree decide the speed alone. logit_bias adds to the logits of these tokens, before
    temperature and filters; -inf never gives one. No end token comes among the first min_new_tokens. eos_token_id None
    takes the target's generation config's; an empty list never stops early. streamer (one row only) is given the
    prompt, then each round's tokens, and its end even where the call fails. stopping_criteria are asked after each
    token with the prompts as given and the new tokens behind them [B, T + new], ended rows padded, and no scores: a row
    ends with the first token at which one says so. return_logprobs gives log softmax of the target's own logits for
    each new token, at temperature 1, without bias and filters: what scoring the text would give, so that calls with
    different settings compare, and no emitted token is at -inf.

    On CUDA each round is one graph's replay (graph=False: eagerly); page_size keeps the target's cache in pages. An
    engine keeps buffers and graphs from call to call; what shapes them (tree, return_logprobs, graph, page_size) is
    then given to it, not here.

    Raises ValueError for bad arguments, for targets or drafts that do not fit, and where the request does not fit the
    engine; TypeError for a tree that is none; RuntimeError where the target gives a row no finite logit; GraphError
    where a round cannot be captured.
    Paper: section 3.4; docs/design.md: A round of decoding.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: at least 1")
    wrapped = Target(target)
    target = wrapped.model
    if target.training:
        raise ValueError(
            "the target is in training mode, where dropout makes its tokens random; allowed: target.eval()"
        )
    options: dict[str, Any] = {
        "tree": tree,
        "graph": graph,
        "page_size": page_size,
        "return_logprobs": return_logprobs or None,
    }
    _check_engine(engine, target, draft, options)
    beside = checked_inputs(wrapped, model_inputs)
    prompts, lengths = _prompts(input_ids, attention_mask, wrapped, named_tokens(wrapped.model) if beside else [])
    wrapped.check_length(int(lengths.min()), prompts.shape[1] + max_new_tokens)
    pictures = PicturePrompt.of(wrapped, input_ids, attention_mask, beside) if beside else None
    sampling = Sampling.of(len(prompts), seed, temperature, top_k, top_p, min_p, device=wrapped.device)
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"a streamer was given with {len(prompts)} rows; allowed: 1 row")
    ends, pad = _end_tokens(target, eos_token_id, pad_token_id)
    bias = logit_bias
    if not isinstance(bias, Bias):
        bias = Bias.of(wrapped.config.vocab_size, bias, ends, min_new_tokens)

    def decode() -> Generated:
        made = engine or Engine(
            target,
            draft,
            batch=len(prompts),
            capacity=prompts.shape[1] + max_new_tokens,
            **{**options, "return_logprobs": return_logprobs},
        )
        shown = input_ids.to(wrapped.device)
        decoding = Decoding(
            made, prompts, lengths, max_new_tokens, stopping_criteria, shown=shown, pad=pad, pictures=pictures
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for run in decoding.run(sampling, ends, bias):
            if streamer is not None and run[0]:
                streamer.put(torch.tensor(run[0]))
        if streamer is not None:
            streamer.end()
        if engine is None:
            made.settle()
        sequences = torch.cat([input_ids, decoding.new_tokens(pad).to(input_ids)], 1)
        return Generated(sequences, decoding.report(), decoding.logprobs())

    try:
        return decode()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they would hold the buffers for as long as the error lives
        raise


def _check_engine(engine: Engine | None, target: PreTrainedModel, draft: BeagleDraft | None, options: dict) -> None:
    if engine is None:
        return
    if engine.model is not target or engine.draft is not draft:
        raise ValueError("the engine was made for another target or draft; allowed: the same two objects")
    if given := [name for name, value in options.items() if value is not None]:
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


def _end_tokens(target: PreTrainedModel, eos_token_id, pad_token_id) -> tuple[list[int], int]:
    config = target.generation_config
    ends = end_tokens(target) if eos_token_id is None else token_ids(eos_token_id)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    return ends, pad_token_id
