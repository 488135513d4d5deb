"""The draft model: one cross-attention block over the target's states (docs/design.md: The draft; paper: section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from beagle_sd.models.config import BeagleConfig, write_custom_generate
from beagle_sd.models.layers.int8 import GROUP, Int8Matrix
from beagle_sd.models.layers.linears import FewRowsLinear, linear
from beagle_sd.models.layers.quantize import linears_of, replace
from beagle_sd.models.target import Target

if TYPE_CHECKING:
    from typing_extensions import Self


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 or better inside."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, wide inside
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps).to(x.dtype)


class Rotary(LlamaRotaryEmbedding):
    """Keeps its frequencies in fp32 whatever the draft is cast to: in bf16 positions past 256 would blur."""

    inv_freq: Any

    def __init__(self, config: BeagleConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads the fields both configs have

    def _apply(self, fn, recurse=True):
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if not kept.is_meta:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self


class Angles(NamedTuple):
    """Cosines and sines of RoPE, [..., 1, D] each."""

    cos: Tensor
    sin: Tensor


_SAMPLED_ROWS = 64
_OF_THE_HUB = ("repo_id", "commit_message", "private", "token", "create_pr", "revision", "tags")
"""Arguments of push_to_hub."""


class BeagleDraft(PreTrainedModel):
    """q_i from token embeddings; k_j, v_j from target states (or, for ancestors, draft states); S_i out.

    The target's embedding and LM head are used, never owned: `bind` them after `from_pretrained`.
    """

    config_class = BeagleConfig
    base_model_prefix = "beagle"
    _no_split_modules: list[str] = []
    config: BeagleConfig
    draft_vocab: Tensor | None

    def __init__(self, config: BeagleConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = FewRowsLinear(width, queries, bias=False)
        self.k_proj = FewRowsLinear(width, keys, bias=False)
        self.v_proj = FewRowsLinear(width, keys, bias=False)
        self.o_proj = FewRowsLinear(queries, width, bias=False)
        self.gate_proj = FewRowsLinear(width, config.intermediate_size, bias=False)
        self.up_proj = FewRowsLinear(width, config.intermediate_size, bias=False)
        self.down_proj = FewRowsLinear(config.intermediate_size, width, bias=False)
        self.norm_query = RMSNorm(width, eps) if config.norm_query else nn.Identity()
        self.norm_state = RMSNorm(width, eps) if config.norm_state else nn.Identity()
        self.norm_mlp = RMSNorm(width, eps)
        self.norm_output = RMSNorm(width, eps) if config.norm_output else nn.Identity()
        self.rotary = Rotary(config)
        self.activation = ACT2FN[config.hidden_act]
        reduced = config.draft_vocab_size
        self.register_buffer("draft_vocab", torch.zeros(reduced, dtype=torch.int64) if reduced else None)
        self._shared: tuple[Target, Tensor | Int8Matrix] | None = None
        self._half: Tensor | None = None  # the head's rows in bf16
        self._made_of: tuple[Tensor | None, Tensor | None] = (None, None)  # the vocabulary and the target's half
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Rotary):  # never saved, and from_pretrained leaves its memory unset
            module.inv_freq = Rotary(self.config).inv_freq.to(module.inv_freq.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; ValueError for weights that are cut short or incomplete. `bind` the draft after."""
        name = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{name}: model.safetensors is damaged or cut short ({error}); "
                "allowed: a whole file written by save_pretrained"
            ) from error
        draft, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{name}: model.safetensors lacks {sorted(info['missing_keys'])}; "
                "allowed: all weights of a draft, as written by save_pretrained"
            )
        return (draft, info) if output_loading_info else draft

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers, with what `target.generate(..., custom_generate=NAME)` takes beside the weights."""
        if self.is_int8:
            raise ValueError("the draft is in int8; allowed: to save it before quantize_()")
        hub: dict[str, Any] = {name: kwargs.pop(name) for name in _OF_THE_HUB if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_custom_generate(save_directory)
            if push_to_hub:  # what transformers does last, before which it would have to be written
                self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    @classmethod
    def from_target(cls, model: PreTrainedModel, draft_vocab: Tensor | None = None, **overrides) -> Self:
        """A fresh draft for `model`, bound to it; norm_output starts as a copy of the target's final norm.

        draft_vocab [V'] int64, ascending token ids of the target's vocabulary that the draft may propose.
        """
        target = Target(model)
        if draft_vocab is not None:
            _check_draft_vocab(draft_vocab, target.config.vocab_size)
            overrides["draft_vocab_size"] = len(draft_vocab)
        draft = cls(cls.config_class.of_target(target.config, **overrides))
        draft.to(target.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        if draft.draft_vocab is not None and draft_vocab is not None:
            draft.draft_vocab.copy_(draft_vocab)
        if draft.config.norm_output and (weight := _final_norm(target)) is not None:
            draft.norm_output.load_state_dict({"weight": weight})
        return draft.bind(model)

    def bind(self, model: PreTrainedModel) -> Self:
        """Use `model`'s embedding and LM head. ValueError if it is not the target this draft was made for.

        The vocabulary may have been resized since, its first ids the same: what was added is never proposed.
        """
        target = Target(model)
        self._check_target(target)
        return self._share(target)

    def _share(self, target: Target) -> Self:
        known = self._shared is not None and self._is_head_of(target)
        self._shared = (target, self._bound()[1] if known else self._head_of(target))
        return self

    def _head_of(self, target: Target) -> Tensor | Int8Matrix:
        matrix, half, scale = target.head.matrix, target.head.half, target.head.scale
        head = self._own_rows(matrix.detach() if isinstance(matrix, Tensor) else matrix, target)
        self._half = self._own_rows(half, target) if half is not None and scale == 1.0 else None
        self._made_of = (self.draft_vocab, half)
        return head if scale == 1.0 else head * scale

    def _is_head_of(self, target: Target) -> bool:
        """Whether the head at hand is still the target's, by every so many of its rows: to gather all of them takes as
        long as some tokens."""
        matrix, head = target.head.matrix, self._bound()[1]
        vocab, half = self._made_of
        if vocab is not self.draft_vocab or half is not target.head.half or type(matrix) is not type(head):
            return False
        if matrix.device.type != "cpu" or head.device != matrix.device:
            return False
        step = max(1, len(head) // _SAMPLED_ROWS)
        rows = matrix[: len(head) : step] if vocab is None else matrix[vocab[::step]]
        have, want = _parts(head[::step]), _parts(rows * target.head.scale)
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(have, want))

    def _own_rows(self, weight: Any, target: Target) -> Any:
        if self.draft_vocab is not None:
            _check_draft_vocab(self.draft_vocab, target.config.vocab_size)
            return weight[self.draft_vocab.to(weight.device)]
        return weight[: self.config.vocab_size]

    def set_draft_vocab(self, draft_vocab: Tensor | None) -> Self:
        """Propose these tokens from now on: ascending ids [V'] int64 of the vocabulary that the draft was made for;
        None: all of it. No weight changes, since the head's rows are the target's. To be called before an Engine or a
        Trainer is made of the draft. ValueError for other ids."""
        if draft_vocab is not None:
            _check_draft_vocab(draft_vocab, self.config.vocab_size)
            draft_vocab = draft_vocab.to(self.device, copy=True)
        self.draft_vocab, self.config.draft_vocab_size = draft_vocab, None if draft_vocab is None else len(draft_vocab)
        return self._share(self.target)

    def _check_target(self, target: Target) -> None:
        made, given = self.config, target.config
        if (given.hidden_size, given.vocab_size) == (made.hidden_size, made.vocab_size):
            return
        least = made.vocab_size if self.draft_vocab is None else int(self.draft_vocab[-1]) + 1
        alike = given.hidden_size == made.hidden_size and given.model_type == made.target_type
        if not alike or given.vocab_size < least:
            raise ValueError(
                f"this draft is for a {made.target_type} target with hidden_size={made.hidden_size} and "
                f"vocab_size={made.vocab_size}; given a {given.model_type} with hidden_size={given.hidden_size} and "
                f"vocab_size={given.vocab_size}; allowed: that target, its vocabulary resized to {least} or more"
            )

    @property
    def target(self) -> Target:
        return self._bound()[0]

    @property
    def head(self) -> Tensor:
        """[V', d], the rows of the target's LM head that the draft uses, times the target's logit scale; made anew from
        a head in int8, in float32."""
        head = self._bound()[1]
        return head if isinstance(head, Tensor) else head.floats()

    @property
    def vocab(self) -> int:
        """V', how many tokens the draft may propose."""
        return len(self._bound()[1])

    @property
    def _kind(self) -> torch.dtype:
        """The dtype of what passes between the layers."""
        return self.norm_mlp.weight.dtype

    def quantize_(self, group: int = GROUP) -> Self:
        """Put the linear layers into int8 in place, for decoding; returns the draft, which can then be neither trained
        nor saved. The head is the target's, in int8 if that is (`beagle_sd.quantize_`) when it is bound. ValueError for
        another device than a CPU, and for widths that groups do not divide."""
        replace(linears_of(self, FewRowsLinear, group), group)
        return self

    @property
    def is_int8(self) -> bool:
        """Whether `quantize_` was called."""
        return not isinstance(self.q_proj, FewRowsLinear)

    def _bound(self) -> tuple[Target, Tensor | Int8Matrix]:
        if self._shared is None:
            raise RuntimeError("this draft has no target yet: call draft.bind(target) first")
        return self._shared

    def embed(self, tokens: Tensor) -> Tensor:
        """e(t): [...] int64 -> [..., d]."""
        return self.target.embed(tokens).detach().to(self._kind)

    def queries(self, embedded: Tensor, positions: Tensor | Angles) -> Tensor:
        """q_i = RoPE(W_Q norm_q(e_i), i): [..., d], [...] -> [..., Hq, D]."""
        return self._rotate(self.q_proj(self.norm_query(embedded)), positions)

    def keys_values(self, states: Tensor, positions: Tensor | Angles) -> tuple[Tensor, Tensor]:
        """k_j = RoPE(W_K norm_s(X_j), j), v_j = W_V norm_s(X_j): [..., d], [...] -> two [..., Hkv, D]."""
        states = self.norm_state(states.to(self._kind))
        values = self.v_proj(states)
        return self._rotate(self.k_proj(states), positions), values.unflatten(-1, (-1, self.config.head_dim))

    def angles(self, positions: Tensor) -> Angles:
        """RoPE's at positions [...], which `queries` and `keys_values` take in their place: [..., 1, D] each."""
        cos, sin = self.rotary(self.norm_mlp.weight, positions.reshape(1, -1))
        shape = (*positions.shape, 1, self.config.head_dim)
        return Angles(cos.view(shape), sin.view(shape))

    def block(self, embedded: Tensor, attended: Tensor) -> Tensor:
        """S = norm_o(y + MLP(norm_m(y))), y = W_O attended + e: [..., d], [..., Hq, D] -> [..., d]."""
        y = self.o_proj(attended.flatten(-2)) + embedded
        x = self.norm_mlp(y)
        return self.norm_output(y + self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))

    def logits(self, states: Tensor) -> Tensor:
        """The draft's logits over its own vocabulary, soft-capped as the target's: [..., d] -> [..., V']."""
        target, head = self._bound()
        return target.head.capped(linear(states.to(target.dtype), head, half=self._half))

    def _rotate(self, x: Tensor, positions: Tensor | Angles) -> Tensor:
        x = x.unflatten(-1, (-1, self.config.head_dim))
        cos, sin = self.angles(positions) if isinstance(positions, Tensor) else positions
        half = self.config.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * cos + turned * sin).to(x.dtype)  # in autocast x is in 16 bits, and the values are too


def _parts(matrix: Tensor | Int8Matrix) -> tuple[Tensor, ...]:
    return (matrix.integers, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix.detach(),)


def _check_draft_vocab(ids: Tensor, vocab_size: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"draft_vocab is {ids.dtype} of shape {tuple(ids.shape)}; allowed: int64 [V']")
    if len(ids) == 0 or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError(
            f"draft_vocab has {len(ids)} ids from {ids[:1].tolist()} to {ids[-1:].tolist()}; "
            f"allowed: at least one, ascending without repeats, in [0, {vocab_size})"
        )


def _final_norm(target: Target) -> Tensor | None:
    """The target's final norm's weight, as it acts (Gemma adds 1 to what it stores)."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        if (norm := getattr(target.decoder, name, None)) is not None:
            sign = torch.ones(target.config.hidden_size, device=target.device, dtype=torch.float32)
            sign[1::2] = -1
            probe = (256 * sign).to(target.dtype)[None]  # mean 0, and its square dwarfs eps
            with torch.no_grad():
                return ((norm(probe) - norm(-probe))[0].float() / 2) * sign
    return None
