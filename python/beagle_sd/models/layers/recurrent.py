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
from typing import Any, NamedTuple

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

    def part(self, rows: slice) -> Recurrence:
        """Some rows in the same memory."""
        one = copy.copy(self)
        one.layer = copy.copy(self.layer)
        for name in ("conv_states", "recurrent_states"):
            setattr(one.layer, name, each(getattr(self.layer, name), lambda value: value[rows]))
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
            _Steps(decoder.get_submodule(name), index)


class _Last(NamedTuple):
    """The linear layer whose output is the module's: its inputs [B, 1, k] a token, and the first one's output."""

    forward: Any
    inputs: list[Tensor]
    output: Tensor


class _Steps:
    """A recurrent module that runs a token at a time, but its linear layers on all tokens at once: those that take its
    input, and the one whose output is its own, so that their weights are read once."""

    def __init__(self, module: Any, index: int):
        self.index, self.forward = index, module.forward
        self.first = next(iter(inspect.signature(self.forward).parameters))
        self.token: Tensor | None = None
        self.number = 0
        self.hidden: Tensor | None = None
        self.projected: dict[nn.Module, Tensor] = {}
        self.latest: _Last | None = None
        self.last: _Last | None = None
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                linear.forward = functools.partial(self._linear, linear, linear.forward)  # type: ignore[method-assign]
        module.forward = self._run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        cache = cache_being_read()
        if cache is None or not cache.stepping:
            return self.forward(*args, **kwargs)
        hidden, *others = args if args else (kwargs.pop(self.first),)
        recurrence = cache.recurrences[self.index]
        if cache.recording:
            recurrence.record()
        self.hidden, found = hidden, []
        try:
            for self.number, self.token in enumerate(hidden.split(1, 1)):
                found.append(self.forward(self.token, *others, **kwargs))
                if cache.recording:
                    recurrence.record()
                if self.number == 0:
                    self._see_ending(found[0])
            self.token = None
            return self._joined(found)
        finally:  # a graph's memory would be held with them
            self.token = self.hidden = self.latest = self.last = None
            self.projected = {}

    def _linear(self, linear: nn.Linear, forward: Any, x: Tensor) -> Tensor:
        """A linear layer: its output for the token at hand, or, of the last one, something of its shape."""
        if self.token is None or self.hidden is None or self.hidden.shape[1] == 1:
            return forward(x)
        if x is self.token:
            if linear not in self.projected:
                self.projected[linear] = forward(self.hidden)
            return self.projected[linear][:, self.number : self.number + 1]
        if self.last is not None and self.last.forward is forward:
            self.last.inputs.append(x)
            return self.last.output
        self.latest = _Last(forward, [x], forward(x))
        return self.latest.output

    def _see_ending(self, output: Any) -> None:
        """Whether the module's output for its first token is that of the linear layer that ran last."""
        output = output[0] if isinstance(output, tuple) else output
        latest = self.latest
        if latest is not None and latest.output is output and latest.inputs[0].dim() == 3:
            self.last = latest

    def _joined(self, found: list[Any]) -> Any:
        first = [one[0] if isinstance(one, tuple) else one for one in found]
        whole = torch.cat(first, 1)
        if self.last is not None and len(found) > 1:
            whole = self.last.forward(torch.cat(self.last.inputs, 1))
        return (whole, *found[-1][1:]) if isinstance(found[0], tuple) else whole
