"""The draft model: one cross-attention block over the target's states (docs/design.md: The draft; paper: section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from beagle_sd.models.linears import FewRowsLinear, linear
from beagle_sd.models.target import Target

if TYPE_CHECKING:
    from typing_extensions import Self


class BeagleConfig(PretrainedConfig):
    """Shape of the block, all of it taken from the target by `BeagleDraft.from_target`.

    rope_parameters: as transformers 5 has them; draft_vocab_size: tokens the draft can propose (None: all of the
    target's); norm_query, norm_state, norm_output: RMSNorms that can be switched off; append_states: whether a node
    sees its ancestors' draft states (the paper's "-concate" is False).
    """

    model_type = "beagle"

    def __init__(
        self,
        hidden_size: int = 576,
        intermediate_size: int = 1536,
        num_attention_heads: int = 9,
        num_key_value_heads: int = 3,
        head_dim: int = 64,
        vocab_size: int = 49152,
        draft_vocab_size: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 8192,
        rope_parameters: dict | None = None,
        norm_query: bool = True,
        norm_state: bool = True,
        norm_output: bool = True,
        append_states: bool = True,
        target_type: str = "llama",
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.norm_query = norm_query
        self.norm_state = norm_state
        self.norm_output = norm_output
        self.append_states = append_states
        self.target_type = target_type
        self.initializer_range = initializer_range
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {num_key_value_heads}; allowed: divisors of the "
                f"{num_attention_heads} query heads"
            )
        super().__init__(**kwargs)

    @classmethod
    def of_target(cls, config: PretrainedConfig, **overrides) -> BeagleConfig:
        """The config of a draft for a target with this config; overrides go on top."""
        heads = config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        fields = {
            "hidden_size": config.hidden_size,
            "intermediate_size": max(inner) if isinstance(inner, list | tuple) else inner,  # one a layer
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "vocab_size": config.vocab_size,
            "hidden_act": getattr(config, "hidden_act", "silu"),
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
            "max_position_embeddings": getattr(config, "max_position_embeddings", 8192),
            "target_type": config.model_type,
            "tie_word_embeddings": False,
        }
        rope = getattr(config, "rope_parameters", None)
        if not rope:  # a model of its own code, in transformers 4's names
            rope = {"rope_type": "default", "rope_theta": config.rope_theta}
            rope |= getattr(config, "rope_scaling", None) or {}
        # the draft turns whole heads
        fields["rope_parameters"] = {name: rope[name] for name in rope if name != "partial_rotary_factor"}
        return cls(**{**fields, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> BeagleConfig:
        """As in transformers; ValueError for the config of another kind of model, or one written by transformers 4."""
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"the config is of a {kind} model; allowed: {cls.model_type}, a draft's")
        if not config_dict.get("rope_parameters"):
            raise ValueError(
                "the config has no rope_parameters, as transformers 4 wrote it; allowed: by transformers 5"
            )
        return super().from_dict(config_dict, **kwargs)


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
        self._shared: tuple[Target, Tensor] | None = None
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
        head = target.head.weight.detach()
        if self.draft_vocab is not None:
            _check_draft_vocab(self.draft_vocab, target.config.vocab_size)
            head = head[self.draft_vocab.to(head.device)]
        elif len(head) > self.config.vocab_size:
            head = head[: self.config.vocab_size]
        if target.head.scale != 1.0:
            head = head * target.head.scale
        self._shared = (target, head)
        return self

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
        """[V', d], the rows of the target's LM head that the draft uses, times the target's logit scale."""
        return self._bound()[1]

    def _bound(self) -> tuple[Target, Tensor]:
        if self._shared is None:
            raise RuntimeError("this draft has no target yet: call draft.bind(target) first")
        return self._shared

    def embed(self, tokens: Tensor) -> Tensor:
        """e(t): [...] int64 -> [..., d]."""
        return self.target.embed(tokens).detach().to(self.q_proj.weight.dtype)

    def queries(self, embedded: Tensor, positions: Tensor | Angles) -> Tensor:
        """q_i = RoPE(W_Q norm_q(e_i), i): [..., d], [...] -> [..., Hq, D]."""
        return self._rotate(self.q_proj(self.norm_query(embedded)), positions)

    def keys_values(self, states: Tensor, positions: Tensor | Angles) -> tuple[Tensor, Tensor]:
        """k_j = RoPE(W_K norm_s(X_j), j), v_j = W_V norm_s(X_j): [..., d], [...] -> two [..., Hkv, D]."""
        states = self.norm_state(states.to(self.k_proj.weight.dtype))
        values = self.v_proj(states)
        return self._rotate(self.k_proj(states), positions), values.unflatten(-1, (-1, self.config.head_dim))

    def angles(self, positions: Tensor) -> Angles:
        """RoPE's at positions [...], which `queries` and `keys_values` take in their place: [..., 1, D] each."""
        cos, sin = self.rotary(self.q_proj.weight, positions.reshape(1, -1))
        shape = (*positions.shape, 1, self.config.head_dim)
        return Angles(cos.view(shape), sin.view(shape))

    def block(self, embedded: Tensor, attended: Tensor) -> Tensor:
        """S = norm_o(y + MLP(norm_m(y))), y = W_O attended + e: [..., d], [..., Hq, D] -> [..., d]."""
        y = self.o_proj(attended.flatten(-2)) + embedded
        x = self.norm_mlp(y)
        return self.norm_output(y + self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))

    def logits(self, states: Tensor) -> Tensor:
        """The draft's logits over its own vocabulary, soft-capped as the target's: [..., d] -> [..., V']."""
        return self.target.head.capped(linear(states.to(self.head.dtype), self.head))

    def _rotate(self, x: Tensor, positions: Tensor | Angles) -> Tensor:
        x = x.unflatten(-1, (-1, self.config.head_dim))
        cos, sin = self.angles(positions) if isinstance(positions, Tensor) else positions
        half = self.config.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * cos + turned * sin).to(x.dtype)  # in autocast x is in 16 bits, and the values are too


def _check_draft_vocab(ids: Tensor, vocab_size: int) -> None:
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
