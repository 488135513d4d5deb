"""Recurrent layers in a round: a token at a time, so that the states after each accepted token are had.

A layer of a recurrence - gated delta rule, Mamba, short convolution - keeps states of the whole text and no keys. Over
the N tokens of a chain its module runs N times over one token, as in plain decoding, and the states after each are
kept until the verdict says how many tokens count.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from beagle_sd.models.layers.attention import cache_being_read
from beagle_sd.models.layers.kept import Kept, each, states_of


class Recurrence:
    """The states of one recurrent layer for B rows, in tensors that stay where they are, and those on the way."""

    def __init__(self, template: LinearAttentionLayer, batch: int):
        def rows(one: Tensor) -> Tensor:
            return one.new_zeros(batch, *one.shape[1:])

        self.layer = copy.copy(template)
        self.layer.conv_states = each(template.conv_states, rows)
        self.layer.recurrent_states = each(template.recurrent_states, rows)
        self.layer.has_previous_state = copy.copy(template.has_previous_state)  # True: it has had its token
        self.history: list[list[Tensor]] = []

    @property
    def states(self) -> list[Tensor]:
        return states_of(self.layer)

    def row(self, row: int) -> Recurrence:
        """One row in the same memory."""
        one = copy.copy(self)
        one.layer = copy.copy(self.layer)
        for name in ("conv_states", "recurrent_states"):
            setattr(one.layer, name, each(getattr(self.layer, name), lambda value: value[row : row + 1]))
        one.layer.has_previous_state = copy.copy(self.layer.has_previous_state)
        one.history = []
        return one

    def forget(self) -> None:
        """As before a text."""
        self.layer.reset()

    def set(self, layer: LinearAttentionLayer) -> None:
        """Take the states of a layer of transformers' cache."""
        for state, new in zip(self.states, states_of(layer), strict=True):
            state.copy_(new)

    def record(self) -> None:
        """Keep the states as they are now, behind those kept before."""
        self.history.append([state.clone() for state in self.states])

    def keep(self, taken: Tensor) -> None:
        """Go back to the states after `taken` [B] int64 of the tokens recorded; 0: to those before them."""
        if not self.history:
            return
        rows = torch.arange(len(taken), device=taken.device)
        for state, *kept in zip(self.states, *self.history, strict=True):
            state.copy_(torch.stack(kept)[taken, rows])
        self.history = []


def step_by_step(decoder: PreTrainedModel, kept: Sequence[Kept]) -> None:
    """Let the recurrent modules of a view (view.py) go a token at a time where the cache being read asks for it."""
    for index, one in enumerate(kept):
        for name in one.mixers:
            module: Any = decoder.get_submodule(name)
            module.forward = _stepping(module, index)


def _stepping(module: nn.Module, index: int) -> Any:
    forward = module.forward
    first = next(iter(inspect.signature(forward).parameters))

    @functools.wraps(forward)
    def stepping(*args, **kwargs):
        cache = cache_being_read()
        if cache is None or not cache.stepping:
            return forward(*args, **kwargs)
        hidden, *others = args if args else (kwargs.pop(first),)
        recurrence, found = cache.recurrences[index], []
        for token in hidden.split(1, 1):
            if cache.recording and not found:
                recurrence.record()
            found.append(forward(token, *others, **kwargs))
            if cache.recording:
                recurrence.record()
        if isinstance(found[0], Tensor):
            return torch.cat(found, 1)
        return torch.cat([one[0] for one in found], 1), *found[-1][1:]

    return stepping
