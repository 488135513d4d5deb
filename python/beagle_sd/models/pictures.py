"""Prompts with more in them than text, such as pictures: run by the model's own forward, then moved into our cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from beagle_sd.models.cache import AT_ONCE, TreeCache, causal
from beagle_sd.models.ends import named_tokens
from beagle_sd.models.first_use import difference, used_as
from beagle_sd.models.head import UnsupportedTarget, decoder_of
from beagle_sd.models.layers.kept import states_of
from beagle_sd.models.view import view_of

if TYPE_CHECKING:
    from beagle_sd.models.target import Target

_OURS = ("input_ids", "attention_mask", "inputs_embeds", "use_cache", "cache_position", "labels", "logits_to_keep")
"""Arguments of a model's forward that a caller of ours cannot give beside the prompt."""
_OURS_BEGIN = ("self", "cache", "past_key_values", "output_", "return_dict", "encoder_", "decoder_")
"""How others of them begin."""
_DIFFERENCE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far the state behind a first prompt may be from the model's own, as a share of its norm: roundings are far below,
what a model attends to beside its keys far above."""
_known: WeakKeyDictionary[PreTrainedModel, set[tuple]] = WeakKeyDictionary()
"""What has been compared: the model as it is used, and the inputs' names."""


@dataclass(frozen=True)
class PicturePrompt:
    """Prompts as the caller gave them: ids [B, T] int64 padded on either side, mask [B, T] bool, and what the model
    takes beside them: pixel_values, image_grid_thw, token_type_ids, position_ids ..."""

    ids: Tensor
    mask: Tensor
    inputs: dict[str, Any]

    @classmethod
    def of(cls, target: Target, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]) -> PicturePrompt:
        """On the target's device."""
        device = target.device
        placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        seen = torch.ones_like(ids) if mask is None else mask
        return cls(ids.to(device, torch.int64), seen.to(device) != 0, placed)


def checked_inputs(target: Target, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that are not None; ValueError for names that the target's forward does not take, or that say what is not
    the caller's to say."""
    given = {name: value for name, value in (inputs or {}).items() if value is not None}
    allowed = _allowed(target.decoder) if given else []
    if wrong := [name for name in given if name not in allowed]:
        raise ValueError(
            f"{', '.join(wrong)} given beside the prompt; allowed: input_ids and attention_mask, and in model_inputs "
            f"what the forward of {type(target.decoder).__name__} takes besides: {', '.join(allowed) or 'nothing'}"
        )
    return given


def _allowed(base: PreTrainedModel) -> list[str]:
    parameters = inspect.signature(base.forward).parameters.values()
    names = (one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
    return [name for name in names if name not in _OURS and not name.startswith(_OURS_BEGIN)]


def prefill_pictures(target: Target, prompt: PicturePrompt, cache: TreeCache) -> Tensor:
    """Run the prompts through the whole model into the cache; hidden states [B, L, d] of the rows without padding, L
    the longest one's length, zero behind a row's end. Sets the cache's lengths, and its offsets by the positions that
    the decoder was given.

    The forward is the model's own, with attention and masks of its own, over the batch as it came and not in chunks.
    Its keys and values are moved layer by layer: for a moment they take their memory twice. A model's first prompt with
    such inputs is followed by a token more, by the model's own forward and over our cache, whose states must agree.

    Raises ValueError with the model's own error, and UnsupportedTarget for a model that keeps anything else than a key
    and a value for each token.
    """
    base = decoder_of(view_of(target.model, attention=None))
    own, positions = _whole_cache(target), _told_positions(base, prompt.mask)
    settings = {"use_cache": True, target.cache_argument: own}
    try:
        hidden = base(
            input_ids=prompt.ids, attention_mask=prompt.mask.long(), **prompt.inputs, **settings
        ).last_hidden_state
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise ValueError(
            f"{type(target.model).__name__} does not take the prompt with {', '.join(prompt.inputs)} "
            f"({type(error).__name__}: {error}); allowed: what its processor gives for the prompt, all of it"
        ) from error
    _check_kept(target, own, hidden, prompt, positions)
    lengths, place = prompt.mask.sum(1), _next_positions(positions[0], prompt.mask)
    want = _own_next(target, base, own, prompt, place) if _is_first(target, prompt) else None
    rows = _Rows(prompt.mask, int(lengths.max()))
    _move(target, own, rows, lengths, cache)
    cache.lengths.copy_(lengths)
    cache.offsets.copy_(place - lengths)
    if want is not None:
        _compare_next(target, want, prompt, cache)
    return rows.of(hidden)


def _move(target: Target, own: DynamicCache, rows: _Rows, lengths: Tensor, cache: TreeCache) -> None:
    """What transformers' cache keeps of the prompts into ours; its keys and values go as they are moved."""
    layers: list[Any] = own.layers
    for index, (kept, layer) in enumerate(zip(target.kept, layers, strict=True)):
        if kept.recurrence is not None:
            cache.recurrences[index].set(layer)
        if not kept.heads:
            continue
        keys, values = rows.of(layer.keys), rows.of(layer.values)
        layer.keys = layer.values = None
        for start in range(0, rows.longest, AT_ONCE):
            stop = min(start + AT_ONCE, rows.longest)
            cache.lengths.fill_(start)
            step = torch.arange(stop - start, device=target.device).expand(len(lengths), -1)
            cache.expect(step, None if cache.fixed else stop, stepping=False, ends=lengths)
            cache.update(keys[:, :, start:stop], values[:, :, start:stop], index)


class _Rows:
    """The rows of a padded batch without their padding, zero behind each one's end: a value there that is not finite
    would spoil what does not even see it."""

    def __init__(self, mask: Tensor, longest: int):
        self.longest = longest
        self.index = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :longest]
        self.there = mask.gather(1, self.index)

    def of(self, values: Tensor) -> Tensor:
        """[B, T, d] or [B, H, T, d] -> the same with `longest` for T."""
        index, there = self.index[:, :, None], self.there[:, :, None]
        if values.dim() == 4:
            index, there = index[:, None], there[:, None]
        shape = *values.shape[:-2], self.longest, values.shape[-1]
        return torch.where(there, values.gather(-2, index.expand(shape)), 0)


def _told_positions(base: PreTrainedModel, mask: Tensor) -> list[Tensor]:
    """A list to which the decoder within `base`, a view's, will add the position_ids it is given; where it is given
    none, those that count each row's tokens, which it then takes, as in transformers' generate."""
    decoder = base.get_decoder()
    forward, told = decoder.forward, []
    counted = (mask.cumsum(1) - 1).masked_fill(~mask, 0)

    def telling(*arguments: Any, position_ids: Tensor | None = None, **named: Any) -> Any:
        told.append(counted if position_ids is None else position_ids)
        return forward(*arguments, position_ids=told[-1], **named)

    decoder.__dict__["forward"] = telling
    return told


def _next_positions(positions: Tensor, mask: Tensor) -> Tensor:
    """[B] int64: where the text goes on behind prompts of such positions [B, T], or [3 or 4, B, T]: of time, height and
    width, which after all of a picture go on together, and before them, where there are four, the token's number."""
    axes = positions[-3:] if positions.dim() == 3 else positions[None]
    return axes.masked_fill(~mask, -1).amax((0, 2)) + 1


def _whole_cache(target: Target) -> DynamicCache:
    """A cache of transformers that keeps all keys, in layers that see a window too."""
    cache = DynamicCache(config=target.config)
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    return cache


def _check_kept(target: Target, own: DynamicCache, hidden: Tensor, prompt: PicturePrompt, positions: list) -> None:
    layers: list[Any] = own.layers
    keys = [layer.keys if one.heads else None for one, layer in zip(target.kept, layers, strict=False)]
    if any(one is not None and one.shape[:1] + one.shape[2:3] != prompt.ids.shape for one in keys):
        _refuse(target, prompt, "keeps other than a key and a value for each token of the prompt")
    if len(own.layers) != len(target.kept) or hidden.shape[:2] != prompt.ids.shape:
        _refuse(target, prompt, f"gives {tuple(hidden.shape)} states and {len(own.layers)} layers for the prompt")
    if target.chains_only and not bool(prompt.mask[:, -1].all()):
        _refuse(
            target, prompt, "has recurrent layers, into whose states padding behind the prompts would pass; pad before"
        )
    if len(positions) != 1:
        _refuse(target, prompt, f"gives its decoder the positions of the prompt {len(positions)} times")


def _refuse(target: Target, prompt: PicturePrompt, what: str) -> NoReturn:
    raise UnsupportedTarget(
        f"{type(target.model).__name__} with {', '.join(prompt.inputs)} {what}; allowed: models that put pictures in "
        "the place of tokens and go on as with text, or text alone"
    )


def _used_with(target: Target, prompt: PicturePrompt) -> tuple:
    return *used_as(target), frozenset(prompt.inputs)


def _is_first(target: Target, prompt: PicturePrompt) -> bool:
    return _used_with(target, prompt) not in _known.get(target.model, ())


def _next_token(target: Target, prompt: PicturePrompt) -> Tensor:
    named, vocab = named_tokens(target.model), target.config.vocab_size
    token = next((one for one in range(vocab // 2, vocab) if one not in named), vocab // 2)
    return torch.full_like(prompt.ids[:, :1], token)


def _own_next(target: Target, base: PreTrainedModel, own: DynamicCache, prompt: PicturePrompt, place: Tensor) -> Tensor:
    """The state [B, d] of a token behind the prompts at `place` [B], by the model's own forward; recurrent states are
    then as before it."""
    settings = {"use_cache": True, target.cache_argument: own}
    layers: list[Any] = own.layers
    states = [state for one, layer in zip(target.kept, layers, strict=True) if one.mixers for state in states_of(layer)]
    before = [state.clone() for state in states]
    seen = torch.cat([prompt.mask, torch.ones_like(prompt.mask[:, :1])], 1).long()
    try:
        made = base(input_ids=_next_token(target, prompt), attention_mask=seen, position_ids=place[:, None], **settings)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        _refuse(target, prompt, f"cannot go on behind the prompt with tokens alone ({type(error).__name__}: {error})")
    for state, kept in zip(states, before, strict=True):
        state.copy_(kept)
    return made.last_hidden_state[:, 0].float()


def _compare_next(target: Target, want: Tensor, prompt: PicturePrompt, cache: TreeCache) -> None:
    token = _next_token(target, prompt)
    have = target.forward(token, torch.zeros_like(token), causal(len(token), 1, token.device), cache)[:, 0].float()
    cache.advance(torch.zeros_like(token[:, 0]))
    apart = difference(have, want)
    # broken weights are told of where their logits are used
    if bool(want.isfinite().all()) and not apart <= _DIFFERENCE[target.dtype]:
        _refuse(target, prompt, f"gives other states behind them over our cache (they differ by {100 * apart:.2g}%)")
    _known.setdefault(target.model, set()).add(_used_with(target, prompt))
