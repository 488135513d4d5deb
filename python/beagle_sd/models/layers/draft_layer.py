"""The draft's block in decoding: few rows on a CPU go through `decoder_layer`, from embeddings to states in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_kernels import LayerWeights, Linear, Norm
from beagle_kernels.compiled.decoder_layer import Layers, Parts
from beagle_kernels.decoder_layer import flat
from beagle_sd.models.draft import Angles, BeagleDraft, RMSNorm
from beagle_sd.models.layers.linears import parts_of, served

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The op's, by their names in a config."""
_OF_THE_KEYS = {1, 2, 8, 9, 21, 23, 24}
"""Places of the op's tensors that make keys and values: weights, biases, norm and scales of k and v."""


def draft_layer(draft: BeagleDraft) -> DraftLayer | None:
    """The block of a draft on a CPU, while its weights stay as they are; None where the op cannot serve it."""
    norm, dtypes = draft.norm_mlp.weight, (torch.float32, torch.bfloat16, torch.float16)
    known = norm.device.type == "cpu" and norm.dtype in dtypes and draft.config.hidden_act in _ACTIVATIONS
    return DraftLayer(draft) if known and served() else None


class DraftLayer:
    """S_i of tokens, and where it is asked the keys and values of S_i."""

    def __init__(self, draft: BeagleDraft):
        self.draft, config = draft, draft.config
        self.turns = draft.angles(torch.arange(0))
        norms = (_norm(norm) for norm in (draft.norm_query, draft.norm_mlp, draft.norm_output, draft.norm_state))
        q, k, v, o = (_parts(linear) for linear in (draft.q_proj, draft.k_proj, draft.v_proj, draft.o_proj))
        mlp = (_parts(linear) for linear in (draft.gate_proj, draft.up_proj, draft.down_proj))
        named: dict[str, Any] = dict(zip(("norm_in", "norm_mlp", "norm_out", "norm_state"), norms))
        gate, up, down = mlp
        layer = LayerWeights(q, None, None, o, gate, up, down, **named)
        layer = layer._replace(activation=_ACTIVATIONS[config.hidden_act])
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = draft.norm_mlp.weight.dtype, config.hidden_size, *heads
        scale = config.head_dim**-0.5

        def made(layer: LayerWeights, of_output: bool) -> Layers:
            return Layers([Parts(sizes, *flat(layer), scale, None, of_output)])

        self.without, self.with_keys = made(layer, False), made(layer._replace(k=k, v=v), True)
        tensors, numbers, activation, residual = flat(layer._replace(k=k, v=v))
        alone = [one if place in _OF_THE_KEYS else None for place, one in enumerate(tensors)]
        self.keys = Layers([Parts(sizes, alone, numbers, activation, residual, scale, None, True)])

    def __call__(
        self,
        embedded: Tensor,
        turn: Angles,
        keys: Tensor,
        values: Tensor,
        prefix: Tensor,
        words: Tensor,
        append_at: int | None,
    ) -> Tensor:
        """States [B, n, d] of embedded tokens, all at angles [B, 1, 1, D]; the rest as in drafting.py."""
        layer, shape = self.without if append_at is None else self.with_keys, (*embedded.shape[:2], turn.cos.shape[-1])
        cos, sin = (part[:, :, 0].expand(shape) for part in turn)
        return layer(embedded, cos, sin, (keys, values), prefix, words, None, None, append_at or 0)

    def reserve(self, positions: int) -> None:
        """Know the angles of so many positions: see angles.py."""
        if positions > len(self.turns.cos):
            self.turns = self.draft.angles(torch.arange(positions))

    def angles(self, positions: Tensor) -> Angles:
        """`draft.angles` of positions [B, n], all of them reserved."""
        return Angles(*(F.embedding(positions, part.squeeze(1))[:, :, None] for part in self.turns))

    def append(self, states: Tensor, turn: Angles, keys: Tensor, values: Tensor, lengths: Tensor, ring: int) -> None:
        """The keys and values of states [B, n, d] at angles [B, n, 1, D] into slots lengths[b], lengths[b] + 1, .., of
        a ring if it is not 0."""
        cos, sin = (part[:, :, 0] for part in turn)
        none = torch.zeros(*states.shape[:2], 1, dtype=torch.int64)
        self.keys(states, cos, sin, (keys, values), lengths, none, None, None, 0, ring)


def _parts(linear: nn.Module) -> Linear:
    parts = parts_of(linear)
    if parts is None:
        raise TypeError(f"the draft has a {type(linear).__name__}; allowed: its own linear layers, or those in int8")
    return parts


def _norm(norm: nn.Module) -> Norm | None:
    return Norm(norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None
