"""`target.generate(..., custom_generate=custom_generate(draft))`: speculation behind transformers' own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from beagle_sd.decoding.adaptive import AdaptiveTree
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.models.draft import BeagleDraft

_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_CACHES = ("past_key_values", "cache")
"""transformers' names of the cache it prepares."""
_MODEL_KWARGS = {"attention_mask", "position_ids", "use_cache", "cache_position", "logits_to_keep", *_CACHES}


@dataclass
class SpeculativeOutput(ModelOutput):
    """With return_dict_in_generate: sequences [B * num_return_sequences, prompt + new] int64, the Report, and with
    return_logprobs logprobs [B * num_return_sequences, new] float32."""

    sequences: Tensor | None = None
    report: Report | None = None
    logprobs: Tensor | None = None


def custom_generate(
    draft: BeagleDraft | None,
    *,
    seed: int | Tensor | None = None,
    tree: TreeShape | AdaptiveTree | None = None,
    streamer: BaseStreamer | None = None,
    return_logprobs: bool = False,
    graph: bool | None = None,
    page_size: int | None = None,
    engine: Engine | None = None,
) -> Callable[..., Tensor | SpeculativeOutput]:
    """What `target.generate(custom_generate=...)` takes: decodes with `draft`, the text is that of plain decoding.

    The keywords are those of `beagle_sd.generate`; seed None draws one a row from torch's generator, so that
    torch.manual_seed governs; log-probabilities come in the SpeculativeOutput. Of the generation config: do_sample,
    temperature, top_k, top_p, min_p, lengths, end tokens, max_time, num_return_sequences, return_dict_in_generate (a
    SpeculativeOutput) are honoured, as are stopping criteria, which see one unpadded row [1, length] after each of its
    tokens. Whatever else would change the text (beams, penalties, processors of your own) raises ValueError by name.

    Once custom_generate is a function transformers 5 keeps the streamer and the tokenizer given to its own `generate`
    to itself: give the streamer here, and stop strings as a StopStringCriteria(tokenizer, strings) among the criteria.
    """

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> Tensor | SpeculativeOutput:
        _check(generation_config, input_ids, model_kwargs)
        rows = len(input_ids)
        made = generate(
            model,
            draft,
            input_ids,
            model_kwargs.get("attention_mask"),
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            seed=torch.randint(2**62, (rows,)).to(input_ids.device) if seed is None else seed,
            tree=tree,
            eos_token_id=[] if generation_config.eos_token_id is None else generation_config.eos_token_id,
            pad_token_id=generation_config.pad_token_id,
            streamer=streamer,
            return_logprobs=return_logprobs,
            graph=graph,
            page_size=page_size,
            engine=engine,
            stopping_criteria=[c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)],
            **_settings(logits_processor, generation_config),
        )
        if generation_config.return_dict_in_generate:
            return SpeculativeOutput(made.sequences, made.report, made.logprobs)
        return made.sequences

    return decode


def _settings(processors: LogitsProcessorList, config: GenerationConfig) -> dict[str, Any]:
    """The sampling settings that the prepared processors stand for; they are not applied again."""
    found: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    for processor in processors:
        name = _WARPERS.get(type(processor))
        if name is None or not config.do_sample:
            raise ValueError(
                f"{type(processor).__name__} changes the logits by the text before each token, which a tree does not "
                "have one of; allowed: temperature, top_k, top_p, min_p with do_sample (what the model's own "
                "generation config sets can be unset in the call, as repetition_penalty=1.0)"
            )
        found[name] = getattr(processor, name)
    return found


def _check(config: GenerationConfig, input_ids: Tensor, model_kwargs: dict) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"the generation mode is {mode.value}; allowed: greedy_search, sample")
    for name in _OUTPUTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{name} is set; allowed: unset (nodes of a tree that are not kept have values too); "
                "beagle_sd.generate(..., return_logprobs=True) gives the new tokens' log-probabilities"
            )
    if config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation is {config.cache_implementation!r}; allowed: unset, the loop has a cache of its own"
        )
    if unknown := {name for name, value in model_kwargs.items() if value is not None} - _MODEL_KWARGS:
        raise ValueError(f"{', '.join(sorted(unknown))} given to generate; allowed: input_ids and attention_mask")
    for name in _CACHES:
        if (past := model_kwargs.get(name)) is not None and past.get_seq_length() > 0:
            raise ValueError(f"{name} holds tokens; allowed: none, the loop has a cache of its own")
    if input_ids.shape[1] >= config.max_length:
        raise ValueError(
            f"the prompt has {input_ids.shape[1]} tokens and max_length is {config.max_length}; "
            "allowed: a longer max_length, or max_new_tokens"
        )
