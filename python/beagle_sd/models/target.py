"""A Hugging Face causal LM as the decoding loop and the trainer see it: untouched, checked, called in one way."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from beagle_sd.models.cache import AT_ONCE, TreeCache, causal
from beagle_sd.models.first_use import check_first_use, difference, used_as
from beagle_sd.models.head import Head, UnsupportedTarget, decoder_of, head_of
from beagle_sd.models.layers.angles import look_up
from beagle_sd.models.layers.attention import packed, reading
from beagle_sd.models.layers.kept import Kept, kept_by
from beagle_sd.models.layers.recurrent import step_by_step
from beagle_sd.models.layers.weights import hooked
from beagle_sd.models.layers.whole import described
from beagle_sd.models.supported import angles_change_at, check_length, check_supported, positions_in_table
from beagle_sd.models.view import uncompiled, view_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model in what torch.compile or PEFT made of it; UnsupportedTarget where there is none."""
    inner: Any = uncompiled(model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        if getattr(inner.active_peft_config, "is_prompt_learning", False):
            raise UnsupportedTarget(
                f"the target is a PEFT model with {inner.active_peft_config.peft_type.value}, whose learned prompt is "
                "no part of the tokens; allowed: adapters in the layers, such as LoRA"
            )
        inner = inner.get_base_model()  # its layers have the adapters
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedTarget(
            f"the target is a {type(inner).__name__}; allowed: a transformers model, also compiled or in PEFT's wrapper"
        )
    return inner


CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""transformers' names of the cache: the first from 5.24 on, model by model, where it warns of the older ones; the last
in recurrent models."""

_kept: WeakKeyDictionary[PreTrainedModel, tuple[tuple, tuple[Kept, ...]]] = WeakKeyDictionary()


class Target:
    """What is used of a target: embedding, top hidden states over new tokens, LM head.

    Raises UnsupportedTarget for a model whose drafted tokens cannot be verified: by its config (supported.py), by its
    head (head.py), or by what a first use shows (layers/kept.py, first_use.py).
    """

    def __init__(self, model: nn.Module):
        model = unwrapped(model)
        config = model.config.get_text_config()
        check_supported(config)
        self.model = model
        self.config = config
        self.head: Head = head_of(model)
        self.decoder = decoder_of(model)
        named = inspect.signature(self.decoder.forward).parameters
        self.cache_argument = next((name for name in CACHE_ARGUMENTS if name in named), "past_key_values")
        self.embedding: nn.Module = model.get_input_embeddings()
        if self.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UnsupportedTarget(f"the target is in {self.dtype}; allowed: {allowed}")
        check_first_use(self)

    @cached_property
    def _view(self) -> PreTrainedModel:
        """The decoder as decoding runs it: made when it is first needed, as the model is then."""
        view = decoder_of(view_of(self.model))
        step_by_step(view, self.kept)
        rotary = getattr(view, "rotary_emb", None)
        if isinstance(rotary, nn.Module) and angles_change_at(self.config) is None and not hooked(rotary):
            look_up(rotary)
        return view

    @property
    def layers(self) -> str | None:
        """How the decoder's layers run (layers/whole.py); None before they have, and where there is no other way."""
        return described(self._view)

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """What each layer keeps of a text."""
        state = used_as(self)
        if (known := _kept.get(self.model)) is None or known[0] != state:
            view = decoder_of(view_of(self.model))
            token = torch.full((1, 1), self.config.vocab_size // 2, device=self.device)

            def run(cache: Any) -> None:
                view(
                    input_ids=token,
                    position_ids=torch.zeros_like(token),
                    use_cache=True,
                    **{self.cache_argument: cache},
                )

            as_is = nullcontext() if self.device.type == "meta" else torch.autocast(self.device.type, enabled=False)
            with as_is:
                _kept[self.model] = known = state, kept_by(view, self.config, run)
        return known[1]

    @cached_property
    def _table(self) -> int | None:
        return positions_in_table(self.decoder, self.config, self.embedding)

    @cached_property
    def _ends_matter(self) -> bool:
        """Whether the model must not be given positions beyond a text's end, as drafted tokens may have."""
        return self._table is not None or angles_change_at(self.config) is not None

    @cached_property
    def _attends(self) -> bool:
        return any(one.heads for one in self.kept)

    @property
    def chains_only(self) -> str | None:
        """Why a round's drafted tokens must be a chain; None where they may be a tree."""
        recurrent = [index for index, one in enumerate(self.kept) if one.recurrence is not None]
        if not recurrent:
            return None
        return f"{type(self.model).__name__} has recurrent layers (layer {recurrent[0]}), whose states follow one text"

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states: the head's, or with a head in int8 the model's."""
        matrix = self.head.matrix
        return matrix.dtype if isinstance(matrix, Tensor) else self.model.dtype

    @property
    def is_int8(self) -> bool:
        """Whether its linear layers are in int8 (layers/quantize.py)."""
        return not isinstance(self.head.matrix, Tensor)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer is given: [...] int64 -> [..., d], with the model's scale (Gemma's is in the module,
        Granite's in the config)."""
        embedded = self.embedding(tokens)
        scale = getattr(self.config, "embedding_multiplier", None)
        return embedded if scale in (None, 1.0) else embedded * scale

    def states(self, tokens: Tensor) -> Tensor:
        """Top hidden states [B, T, d] of whole texts [B, T] int64, by the model's own forward."""
        return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def own(self, tokens: Tensor, cache: Cache, begin: int) -> Tensor:
        """Top hidden states [B, N, d] of N more tokens of texts whose first `begin` a cache of transformers has."""
        position = torch.arange(begin, begin + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        given = {"position_ids": position, self.cache_argument: cache}
        return self.decoder(input_ids=tokens, use_cache=True, **given).last_hidden_state

    def new_cache(
        self, batch: int, slots: int, *, page_size: int | None = None, at_once: int = 1, fixed: bool = False
    ) -> TreeCache:
        """An empty cache of `slots` positions a row, in pages of page_size if given, for at most `at_once` drafted
        tokens a forward; `fixed` as in TreeCache."""
        at_once = max(at_once, AT_ONCE)
        return TreeCache(self.kept, batch, slots, self.device, page_size=page_size, at_once=at_once, fixed=fixed)

    def check_length(self, shortest: int, total: int) -> None:
        """UnsupportedTarget for texts that decoding could not carry on as the model does (supported.py)."""
        check_length(self.config, self._table, shortest, total)

    def forward(self, tokens: Tensor, depth: Tensor, mask: Tensor, cache: TreeCache) -> Tensor:
        """Top hidden states [B, N, d] of N new tokens a row, written to the cache behind its lengths.

        tokens [B, N] int64; depth [B, N], added to the row's length and offset to give positions; mask words [B, N, W]
        int64: which new tokens each one sees (itself too), besides everything below the row's length that its layer
        sees. A fixed cache needs room behind the lengths, which are not read.
        """
        return self._run(tokens, depth, mask, cache, stepping=True, ends=None)

    def _run(
        self, tokens: Tensor, depth: Tensor, mask: Tensor, cache: TreeCache, *, stepping: bool, ends: Tensor | None
    ) -> Tensor:
        """As `forward`; stepping and ends as in TreeCache.expect."""
        limit = None if cache.fixed else int(cache.lengths.max()) + tokens.shape[1]
        if limit is not None and ends is not None:
            limit = min(limit, int(ends.max()))
        cache.expect(depth, limit, stepping=stepping, ends=ends)
        position = (cache.lengths + cache.offsets)[:, None] + depth.long()
        if self._ends_matter:
            position = torch.minimum(position, cache.end - 1)
        with reading(cache):
            return self._view(
                input_ids=tokens,
                attention_mask=mask[:, None] if self._attends else None,
                position_ids=position,
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state

    def prefill(self, tokens: Tensor, lengths: Tensor, cache: TreeCache, begin: Tensor | int = 0) -> Tensor:
        """Run right-padded texts [B, T] with `lengths` [B] into a cache that holds the `begin` tokens before each, an
        int or [B]; hidden states [B, T, d].

        What is returned beyond a row's length is padding's and means nothing. Rows of a target with recurrent layers
        run one by one, since padding would pass into their states.
        """
        begins = torch.as_tensor(begin, device=self.device).to(lengths).expand(len(lengths))
        if not cache.recurrences:
            states = self._prefill(tokens, begins, begins + lengths, cache, follows=False)
            cache.lengths.copy_(begins + lengths)
            return states
        states = torch.zeros(*tokens.shape, self.config.hidden_size, dtype=self.dtype, device=self.device)
        for row, (length, before) in enumerate(zip(lengths.tolist(), begins.tolist(), strict=True)):
            here = slice(row, row + 1)
            one = cache.part(here)
            if not before:
                one.forget()
            ends = begins[here] + length
            states[row, :length] = self._prefill(tokens[here, :length], begins[here], ends, one, follows=before > 0)[0]
            one.lengths.fill_(before + length)
        return states

    def _prefill(self, tokens: Tensor, begins: Tensor, ends: Tensor, cache: TreeCache, *, follows: bool) -> Tensor:
        """Hidden states [B, T, d] of texts [B, T] from `begins` [B] to `ends` [B], in parts; follows: recurrent layers
        have states of what is before them."""
        batch, total = tokens.shape
        states = []
        for start in range(0, total, AT_ONCE):
            part = tokens[:, start : start + AT_ONCE]
            cache.lengths.copy_(torch.minimum(ends, begins + start))
            step = torch.arange(part.shape[1], device=tokens.device).expand(batch, -1)
            mask = causal(batch, part.shape[1], tokens.device)
            if cache.page_size is not None or (batch > 1 and not cache.fixed):  # where padding is not kept
                mask = mask & packed(cache.lengths[:, None, None] + step[:, None] < ends[:, None, None], mask.shape[2])
            stepping = bool(cache.recurrences) and (follows or start > 0) and not self._continues
            states.append(self._run(part, step, mask, cache, stepping=stepping, ends=ends))
        return torch.cat(states, 1)

    @cached_property
    def _continues(self) -> bool:
        """Whether recurrent layers take several tokens at once on from the states of those before (Mamba's own code
        does not)."""
        tokens = torch.arange(6, device=self.device)[None] * (self.config.vocab_size // 6)
        cache, found = self.new_cache(1, 6), []
        for parts in ((6,), (3, 3)):
            cache.forget()
            for part in tokens.split(parts, 1):
                step = torch.arange(part.shape[1], device=self.device)[None]
                mask = causal(1, part.shape[1], self.device)
                states = self._run(part, step, mask, cache, stepping=False, ends=cache.lengths + 6)
                cache.lengths += part.shape[1]
            found.append(states[0, -1])
        return difference(found[1][None], found[0][None]) <= 0.05
