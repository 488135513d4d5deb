"""The draft's block in vLLM's layers, as its EAGLE loop calls it: slot i holds token t_(i+1), state H_i, position i.

The block's keys and values are of the states, its query of the token, which is one position further on: the slot's own
key is then the last that the query sees, and what the block returns is the state that the next slot is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from beagle_sd.models.config import BeagleConfig
from beagle_sd.vllm import COUPLED, lean
from beagle_sd.vllm.checks import Scales, check_parallel, check_target

logger = init_logger(__name__)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class Block(nn.Module):
    """S of tokens and states: [N] int, [N] int64, [N, d] -> [N, d] (docs/design.md: The draft)."""

    attention: Any
    rotary: Any
    activation: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = _draft_config(vllm_config)
        width, head = config.hidden_size, config.head_dim
        parts = get_tensor_model_parallel_world_size()
        # fewer key heads than devices: each has a copy of one
        self.copies = max(1, parts // config.num_key_value_heads)
        keys = config.num_key_value_heads * self.copies
        self.scales = _scales(vllm_config)
        self.embed_tokens = _Shared()
        self.q_proj = _column(ColumnParallelLinear, width, config.num_attention_heads * head, f"{prefix}.q_proj")
        self.kv_proj = _column(MergedColumnParallelLinear, width, [keys * head] * 2, f"{prefix}.kv_proj")
        self.o_proj = _row(config.num_attention_heads * head, width, f"{prefix}.o_proj")
        inner = config.intermediate_size
        self.gate_up_proj = _column(MergedColumnParallelLinear, width, [inner] * 2, f"{prefix}.gate_up_proj")
        self.down_proj = _row(inner, width, f"{prefix}.down_proj")
        self.norm_query, self.norm_state, self.norm_mlp, self.norm_output = (
            RMSNorm(width, config.rms_norm_eps) if has else nn.Identity()
            for has in (config.norm_query, config.norm_state, True, config.norm_output)
        )
        self.activation = get_act_and_mul_fn(config.hidden_act)
        self.rotary = get_rope(
            head,
            max_position=vllm_config.model_config.max_model_len + 1,  # the last query is one further on
            rope_parameters=config.rope_parameters,
        )
        self.attention = Attention(
            config.num_attention_heads // parts,
            head,
            head**-0.5,
            num_kv_heads=keys // parts,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.window_keys,
            prefix=f"{prefix}.attention",
        )

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        if self.scales.embedding != 1.0:
            embedded = embedded * self.scales.embedding
        query = self.q_proj(self.norm_query(embedded))
        keys, values = self.kv_proj(self.norm_state(hidden_states)).chunk(2, -1)
        query, _ = self.rotary(positions + 1, query, None)
        keys, _ = self.rotary(positions, keys.contiguous(), None)
        y = self.o_proj(self.attention(query, keys, values)) + embedded
        return self.norm_output(y + self.down_proj(self.activation(self.gate_up_proj(self.norm_mlp(y)))))


class _Shared(nn.Module):
    """Stands where vLLM puts a module of the target."""

    weight = None


class ServedDraft(nn.Module):
    """A Beagle draft as vLLM's proposers drive it. Embedding and head are the target's."""

    has_own_embed_tokens = False
    has_own_lm_head = False
    lm_head: Any
    draft_vocab: Tensor | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = _draft_config(vllm_config)
        check_parallel(
            self.config, get_tensor_model_parallel_world_size(), vllm_config.parallel_config.pipeline_parallel_size
        )
        target = vllm_config.model_config.hf_config.get_text_config()
        lean.check(vllm_config)
        self.coupled = lean.is_coupled(vllm_config)
        _warn_of_sampling(vllm_config, self.coupled)
        # caches are found by a layer's number, which no layer of the target may have
        number = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.model = Block(vllm_config=vllm_config, prefix=f"draft.layers.{number}")
        self.vocab_size, self.target_vocab_size = self.config.vocab_size, target.vocab_size
        self.logits_processor = LogitsProcessor(target.vocab_size)
        reduced = self.config.draft_vocab_size
        self.register_buffer("draft_vocab", torch.zeros(reduced, dtype=torch.int64) if reduced else None)
        self._rows: tuple[Tensor, Tensor] | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what the logits are computed of, the state that the next slot is given)."""
        if self.draft_vocab is not None and self._rows is None:
            self._rows = self._rows_of_head(self.draft_vocab)
        states = self.model(input_ids, positions, hidden_states)
        return (lean.with_positions(states, positions + 2) if self.coupled else states), states

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[N, V] of the target's vocabulary, -inf where this draft proposes nothing."""
        logits, ids = self._logits(hidden_states[:, : self.config.hidden_size])
        full = logits.new_full((len(logits), self.target_vocab_size), -torch.inf)
        if ids is None:
            full[:, : logits.shape[1]] = logits
        else:
            full[:, ids] = logits
        return full

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The drafted tokens [N] int64 of the target's vocabulary."""
        if self.coupled:
            states, positions = lean.positions_of(hidden_states, self.config.hidden_size)
            return lean.leaning(*self._logits(states), positions)
        if self._rows is None and self.vocab_size >= self.target_vocab_size:
            # each device's best of its part: scale and cap change no order, and no logits are gathered
            return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        logits, ids = self._logits(hidden_states)
        best = logits.argmax(-1)
        return best if ids is None else ids[best]

    def _logits(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The draft's logits [N, V'], scaled and capped as the target's, and their ids (None: 0 to V' - 1)."""
        if self._rows is None:
            logits, ids = self.logits_processor(self.lm_head, states)[:, : self.vocab_size], None
        else:
            weight, order = self._rows
            logits = nn.functional.linear(states.to(weight.dtype), weight)
            if get_tensor_model_parallel_world_size() > 1:
                logits = tensor_model_parallel_all_gather(logits)[:, order]
            ids = self.draft_vocab
        scales = self.model.scales
        if scales.logits != 1.0:
            logits = logits * scales.logits
        if scales.cap is not None:
            logits = torch.tanh(logits / scales.cap) * scales.cap
        return logits, ids

    def _rows_of_head(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows of the head that the draft may propose [R, d], and where each of the ids [V'] lies in what
        all ranks' R columns give side by side.

        Each rank holds some of the vocabulary in order, and R is what the one with most ids has.
        """
        head = self.lm_head
        weight = head.weight
        if not isinstance(head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            raise ValueError(
                f"the target's LM head is quantised ({type(head.quant_method).__name__}), of which a draft with "
                "draft_vocab needs some rows as they are; allowed: a plain head, or a draft without draft_vocab"
            )
        per_rank = head.num_embeddings_per_partition
        rank_of = ids // per_rank
        counts = torch.bincount(rank_of, minlength=head.tp_size)
        most = int(counts.max())
        within = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[rank_of]
        mine = ids[rank_of == get_tensor_model_parallel_rank()] % per_rank
        rows = weight.new_zeros(most, weight.shape[1])
        rows[: len(mine)] = weight[mine]
        return rows, rank_of * most + within

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """ValueError for a file that lacks a weight or has one too many."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if self.draft_vocab is not None:
            parameters["draft_vocab"] = self.draft_vocab
        wanted = {saved for name in parameters for saved in _saved_names(name)}
        loaded = set()
        for name, tensor in weights:
            if name not in wanted:
                raise ValueError(f"the draft's weights have {name}; allowed: {', '.join(sorted(wanted))}")
            self._load(name, tensor, parameters)
            loaded.add(name)
        if missing := wanted - loaded:
            raise ValueError(f"the draft's weights lack {', '.join(sorted(missing))}; allowed: all of a saved draft")
        return set(parameters)

    def _load(self, name: str, tensor: Tensor, parameters: dict[str, Tensor]) -> None:
        if name == "draft_vocab":
            parameters[name].copy_(tensor)
            return
        module, _, kind = name.partition(".")
        merged, part = _MERGED.get(module, (module, None))
        parameter = parameters[f"model.{merged}.{kind}"]
        if merged == "kv_proj" and self.model.copies > 1:
            heads = tensor.unflatten(0, (-1, self.config.head_dim))
            tensor = heads.repeat_interleave(self.model.copies, 0).flatten(0, 1)
        load = getattr(parameter, "weight_loader", default_weight_loader)
        load(parameter, tensor) if part is None else load(parameter, tensor, part)


_MERGED = {
    "k_proj": ("kv_proj", 0),
    "v_proj": ("kv_proj", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def _saved_names(name: str) -> list[str]:
    """What in the draft's file makes up a parameter of this module."""
    _, _, plain = name.rpartition("model.")
    module, _, kind = plain.partition(".")
    parts = [saved for saved, (merged, _) in _MERGED.items() if merged == module]
    return [f"{part}.{kind}" for part in parts] or [plain]


def _warn_of_sampling(vllm_config: VllmConfig, coupled: bool) -> None:
    """What requests at a temperature above 0 have to know, once."""
    if current_platform.is_cpu() and not vllm_config.use_v2_model_runner:
        logger.warning_once(
            "on a CPU vLLM's first model runner loses the temperatures under speculation: ask at temperature 0, or "
            "take the second (VLLM_USE_V2_MODEL_RUNNER=1, which needs Triton for the CPU)"
        )
    elif not coupled:
        logger.warning_once(
            "texts sampled at a temperature above 0 have the target's law but depend on the draft; those of "
            "beagle_sd.generate with the same seed come with --logits-processors %s",
            COUPLED,
        )


def _column(kind, width: int, size, prefix: str) -> nn.Module:
    return kind(width, size, bias=False, return_bias=False, prefix=prefix)


def _row(size: int, width: int, prefix: str) -> nn.Module:
    return RowParallelLinear(size, width, bias=False, return_bias=False, prefix=prefix)


def _draft_config(vllm_config: VllmConfig) -> BeagleConfig:
    return vllm_config.speculative_config.draft_model_config.hf_config.model


def _scales(vllm_config: VllmConfig) -> Scales:
    target = vllm_config.model_config
    return check_target(_draft_config(vllm_config), target.hf_config, target.dtype)
