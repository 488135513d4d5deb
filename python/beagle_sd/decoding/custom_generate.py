"""`target.generate(..., custom_generate=custom_generate(draft))`: speculation behind transformers' own call."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import ends_its_streamer, generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.settings.processors import settings_of
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.config import saved_draft
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.target import CACHE_ARGUMENTS

_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OWN = {
    "attention_mask",
    "use_cache",
    "cache_position",
    "logits_to_keep",
    "tokenizer",
    "assistant_tokenizer",
    *CACHE_ARGUMENTS,
}
"""What it prepares that says nothing the loop does not know itself, or that it has used itself."""
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""0 for text."""


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
    torch.manual_seed governs; log-probabilities come in the SpeculativeOutput. Of the call, honoured are streamer,
    stop_strings with tokenizer, and stopping criteria, which see what plain generate shows them; of the generation
    config do_sample, temperature, top_k, top_p, min_p, lengths (minimal ones too), suppress_tokens,
    begin_suppress_tokens, bad_words_ids and sequence_bias of one token each, end tokens, max_time,
    num_return_sequences, return_dict_in_generate (a SpeculativeOutput). Pictures in the prompt go where they always do;
    whatever else would change the text (beams, penalties, processors of your own) raises ValueError by name.
    RuntimeError for a transformers that prepares its call in an unknown way.
    """
    _hand_on_streamers()
    options = {
        "tree": tree,
        "return_logprobs": return_logprobs,
        "graph": graph,
        "page_size": page_size,
        "engine": engine,
    }
    return _Speculation(draft, seed, streamer, options)


class _Speculation:
    """See `custom_generate`; a class of its own so that `_hand_on_streamers` knows it."""

    def __init__(self, draft: BeagleDraft | None, seed, streamer: BaseStreamer | None, options: dict[str, Any]):
        self.draft, self.seed, self.streamer, self.options = draft, seed, streamer, options

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **given,
    ) -> Tensor | SpeculativeOutput:
        settings = self._settings(
            model, input_ids, logits_processor, stopping_criteria, generation_config, given, streamer=streamer
        )
        shown = self.streamer if streamer is None else _AfterPrompt(streamer)
        mask = given.get("attention_mask")
        made = generate(model, self.draft, input_ids, mask, streamer=shown, **settings, **self.options)
        if generation_config.return_dict_in_generate:
            return SpeculativeOutput(made.sequences, made.report, made.logprobs)
        return made.sequences

    @ends_its_streamer
    def _settings(self, model, input_ids, processors, criteria, config, given: dict, *, streamer) -> dict[str, Any]:
        """The arguments of beagle_sd.generate that the prepared call asks for; ValueError where it cannot be had."""
        if streamer is not None and self.streamer is not None:
            raise ValueError("a streamer was given to generate and to custom_generate; allowed: one of them")
        _check(config, input_ids)
        rows, width = input_ids.shape
        vocab_size = model.config.get_text_config().vocab_size
        mask = given.get("attention_mask")
        padding = [0] * rows if mask is None else (mask == 0).sum(1).tolist()
        sampling, rules = settings_of(processors, config.do_sample, width, vocab_size, padding)
        own = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        if own and not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            own = [_Together(own)]
        return {
            "model_inputs": _beside(given, input_ids),
            "max_new_tokens": config.max_length - width,
            "seed": torch.randint(2**62, (rows,)).to(input_ids.device) if self.seed is None else self.seed,
            "eos_token_id": [] if config.eos_token_id is None else config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "stopping_criteria": own,
            **rules,
            **sampling,
        }


class _AfterPrompt(BaseStreamer):
    """A streamer to which transformers itself has given the prompt."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.prompt = streamer, True

    def put(self, value) -> None:
        if not self.prompt:
            self.streamer.put(value)
        self.prompt = False

    def end(self) -> None:
        self.streamer.end()


class _Together(StoppingCriteria):
    """Without end tokens transformers pads no row: each goes on until all have been stopped."""

    def __init__(self, criteria: list[StoppingCriteria]):
        self.criteria, self.stopped = StoppingCriteriaList(criteria), torch.tensor(False)

    def __call__(self, input_ids, scores, **kwargs):
        self.stopped = self.criteria(input_ids, scores, **kwargs) | self.stopped.to(input_ids.device)
        return self.stopped.all().expand(len(input_ids))


_READ = "_extract_generation_mode_kwargs"


@functools.cache
def _hand_on_streamers() -> None:
    """transformers keeps the streamer and the tokenizer given to generate from a custom_generate that is a function;
    from now on ours gets what the model's own methods of decoding do. RuntimeError where they cannot be had."""
    read = getattr(GenerationMixin, _READ, None)
    if read is None:
        raise RuntimeError(
            f"transformers {transformers.__version__} prepares generate in another way than those this was written "
            "for, and a streamer given to it would be lost; allowed: beagle_sd.generate, or transformers 5.24"
        )

    @functools.wraps(read)
    def reading(model, custom_generate, *arguments, **named):
        ours = isinstance(custom_generate, _Speculation)
        return read(model, None if ours else custom_generate, *arguments, **named)

    setattr(GenerationMixin, _READ, reading)


def _check(config: GenerationConfig, input_ids: Tensor) -> None:
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
    if input_ids.shape[1] >= config.max_length:
        raise ValueError(
            f"the prompt has {input_ids.shape[1]} tokens and max_length is {config.max_length}; "
            "allowed: a longer max_length, or max_new_tokens"
        )


def _holds_tokens(cache: Any) -> bool:
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # recurrent layers alone, which count none
        return any(any(layer.has_previous_state.values()) for layer in cache.layers)


def _beside(given: dict, input_ids: Tensor) -> dict[str, Any] | None:
    """What was given to generate, or prepared of it, for the prompt beside a text and its mask; None for a text alone.
    ValueError for what cannot be honoured, and for positions of a text that do not count it."""
    if given.get("assistant_model") is not None:
        raise ValueError("assistant_model given to generate; allowed: none, the draft drafts")
    for name in CACHE_ARGUMENTS:
        if (past := given.get(name)) is not None and _holds_tokens(past):
            raise ValueError(f"{name} holds tokens; allowed: none, the loop has a cache of its own")
    own = _OWN | {"assistant_model", *(() if given.get("synced_gpus") else ("synced_gpus",))}
    said = {name: value for name, value in given.items() if value is not None and name not in own}
    if any(_of_pictures(name, value) for name, value in said.items()):
        return said
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids)
    if (value := said.get("position_ids")) is not None:
        counted = mask.cumsum(-1) - 1  # M-RoPE has a line for each of its kinds: alike where all is text
        same = value.shape[-1] == counted.shape[-1] and value.to(counted) == counted
        if same is False or bool((~same & (mask != 0)).any()):
            raise ValueError("position_ids do not count each row's tokens from 0; allowed: those, or none")
    if (value := said.get("rope_deltas")) is not None:
        if bool((value.to(mask).flatten() != mask.sum(1) - mask.shape[1]).any()):
            raise ValueError("rope_deltas are of a text with images; allowed: text alone, which needs none")
    return None


def _of_pictures(name: str, value: Any) -> bool:
    """Whether it says that the prompt is no text alone."""
    if name in ("position_ids", "rope_deltas"):
        return False
    if name == "mm_encoder_outputs":
        return bool(value)
    return name not in _TOKEN_TYPES or bool((value != 0).any())


_HUB = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
"""Of what was given to generate, what says how the draft comes from a hub."""
_OPTIONS = ("seed", "tree", "return_logprobs", "graph", "page_size")
"""Of custom_generate."""
_loaded: WeakKeyDictionary[PreTrainedModel, dict[tuple, BeagleDraft]] = WeakKeyDictionary()
"""Of each target the draft that was loaded for it last, not bound: it would keep the target alive."""
_loading = threading.Lock()


def generate_saved(
    model: PreTrainedModel,
    module: str,
    folder: str,
    saved: str,
    *,
    draft: str | Path | BeagleDraft | None = None,
    streamer: BaseStreamer | None = None,
    **arguments: Any,
) -> Tensor | SpeculativeOutput:
    """What `custom_generate/generate.py` beside a saved draft calls: `target.generate(..., custom_generate=NAME,
    trust_remote_code=True)` decodes with the draft of this name, which is loaded once for a target.

    module, folder, saved: how that file knows its draft; draft: another one, or its folder where it was moved.
    arguments: generate's, and of custom_generate's seed, tree, return_logprobs, graph and page_size. Returns and raises
    what they do, and ValueError where the draft is not found.
    """
    hub, options = ({name: arguments.pop(name) for name in names if name in arguments} for names in (_HUB, _OPTIONS))
    arguments.pop("revision", None)  # transformers took the file from it, whose name says it
    if not isinstance(draft, BeagleDraft):
        draft = _load(model, draft, module, folder, saved, hub, streamer=streamer)
    by: Any = custom_generate(draft, **options)
    return GenerationMixin.generate(model, custom_generate=by, streamer=streamer, **arguments)


@ends_its_streamer
def _load(
    model: PreTrainedModel, given: str | Path | None, module: str, folder: str, saved: str, hub: dict, *, streamer
) -> BeagleDraft:
    """The draft as the target is, bound to it; from memory if it was loaded and its folder has not changed."""
    name, revision = (str(given), None) if given is not None else saved_draft(module, folder, saved)
    changed = max((path.stat().st_mtime_ns for path in Path(name).glob("*.*")), default=None)
    key = (name, revision, changed, model.dtype, model.device)
    with _loading:
        drafts = _loaded.setdefault(model, {})
        if key not in drafts:
            at: dict[str, Any] = hub | ({"revision": revision} if revision else {})
            fresh: Any = BeagleDraft.from_pretrained(name, **at)
            drafts.clear()
            drafts[key] = fresh.to(device=model.device, dtype=model.dtype).eval()
        return copy.copy(drafts[key]).bind(model)
