"""A target's first use: a short text with a branch through our cache and mask, beside the model's own forward of it.

What a config does not tell shows here: masks of the model's own, states that cannot be taken back, rows that depend on
those beside them. Of a target with recurrent layers it is two chains, the first of which is taken back to its root.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import beagle_kernels
from beagle_sd.models.cache import TreeCache, causal
from beagle_sd.models.ends import named_tokens
from beagle_sd.models.head import UnsupportedTarget

if TYPE_CHECKING:
    from beagle_sd.models.target import Target

_TEXTS = 6, 64
_PARENTS = (-1, 0, 0, 1, 2, 3, 4)
"""A root with two branches of three tokens: node n's parent."""
_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the norm of the difference of two forwards may be from none, as a share of the values' own norm."""
_TF32 = 0.02
_INT8 = 0.05
"""Where activations are rounded to integers, of which some fall otherwise with the last bit of what comes before."""
_NOISE = 4.0
"""In 16 bits, as far as so many times what two ways of the model's own forward differ by: experts may change."""
_known: WeakKeyDictionary[PreTrainedModel, tuple] = WeakKeyDictionary()


def check_first_use(target: Target) -> None:
    """Raise UnsupportedTarget, saying what differs, unless the target's states over our cache and a tree are those of
    its own forward. Some forwards over a few tokens, once a model, dtype and device; again if modules were replaced."""
    model = target.model
    if model.training or target.device.type == "meta":  # dropout, or nothing to compute with
        return
    state = used_as(target)
    if _known.get(model) != state:
        with torch.inference_mode(), torch.autocast(target.device.type, enabled=False):
            _compare(target)
        _known[model] = state


def used_as(target: Target) -> tuple:
    """What a model is known by: another dtype, device, attention or module makes it another."""
    attention = getattr(target.config, "_attn_implementation", None)
    return target.dtype, target.device, attention, tuple(map(id, target.model.modules()))


def _compare(target: Target) -> None:
    count = _text_length(target)
    tokens = _tokens(target, count + len(_PARENTS))
    branches = [_path(node) for node in (len(_PARENTS) - 2, len(_PARENTS) - 1)]
    text = tokens[:count]
    texts = torch.stack([torch.cat([text, tokens[count + torch.tensor(nodes)]]) for nodes in branches])
    own = _own(target, texts, count)
    if not bool(own.isfinite().all()):  # broken weights are told of where their logits are used
        return
    alone = target.states(text[None])[0]
    allowed = _allowed(target, difference(own[0, :count], alone))
    _refuse_over(allowed, own[0, :count], alone, target, "the start of a text in a batch, by its own forward,")
    cached, tree = _by_our_cache(target, tokens, count)
    _refuse_over(allowed, cached, own[0, :count], target, "a plain text")
    for nodes, want in zip(branches, own[:, count:], strict=True):
        _refuse_over(allowed, tree[nodes], want, target, "a text's tokens beside another branch of a tree")


def _own(target: Target, texts: Tensor, count: int) -> Tensor:
    """The states [B, T, d] of texts [B, T] by the model's own forward. A recurrence may go on otherwise from token to
    token than over a text at once (Mamba 2 bounds its steps in the latter alone): there it runs as the model
    decodes."""
    if not target.chains_only:
        return target.states(texts)
    cache = DynamicCache(config=target.config)
    states = [target.own(texts[:, :count], cache, 0)]
    for number in range(count, texts.shape[1]):
        states.append(target.own(texts[:, number : number + 1], cache, number))
    return torch.cat(states, 1)


def _text_length(target: Target) -> int:
    """A text within which no angles change (of few tokens, but for a model whose angles change at fewer still)."""
    for count in _TEXTS:
        try:
            target.check_length(count, count + len(_PARENTS))
        except UnsupportedTarget:
            continue
        return count
    return _TEXTS[0]


def _tokens(target: Target, count: int) -> Tensor:
    """Tokens all over the vocabulary, none that the config names (an image's stands for more than text)."""
    vocab = target.config.vocab_size
    named = named_tokens(target.model)
    found = []
    for number in range(count):
        token = (2 * number + 1) * vocab // (2 * count)
        found.append(next((near for near in range(token, vocab) if near not in named), token))
    return torch.tensor(found, device=target.device)


def _path(node: int) -> list[int]:
    return [*_path(_PARENTS[node]), node] if node >= 0 else []


def _by_our_cache(target: Target, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The states of the text, the first `count` tokens, and of the tree's nodes, as rounds compute them."""
    cache = None
    try:
        cache = target.new_cache(1, len(tokens))
        lengths = torch.tensor([count], dtype=torch.int32, device=target.device)
        text = target.prefill(tokens[None, :count], lengths, cache)
        nodes = tokens[None, count:]
        tree = _as_chains(target, nodes, cache) if target.chains_only else _as_tree(target, nodes, cache)
    except (UnsupportedTarget, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _in_the_kernels(error):
            raise
        if cache is not None and not getattr(target.model, "_supports_attention_backend", False):
            _check_attended(target, cache)
        raise UnsupportedTarget(
            f"{type(target.model).__name__} cannot run over a cache of keys and values with a tree's mask "
            f"({type(error).__name__}: {error}); allowed: models whose layers attend by the mask they are given"
        ) from error
    _check_attended(target, cache)
    return text[0], tree


def _in_the_kernels(error: Exception) -> bool:
    """Whether an error other than of a wrong argument arose in beagle_kernels: it says nothing of the target."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = Path(at.tb_frame.f_code.co_filename) if at is not None else Path()
    return not isinstance(error, ValueError) and Path(beagle_kernels.__file__).parent in where.parents


def _as_tree(target: Target, tokens: Tensor, cache: TreeCache) -> Tensor:
    """The states [N, d] of the tree's nodes [1, N] in one forward."""
    nodes = range(len(_PARENTS))
    depth = torch.tensor([[len(_path(node)) - 1 for node in nodes]], device=target.device)
    words = torch.tensor([[[sum(1 << seen for seen in _path(node))] for node in nodes]], device=target.device)
    return target.forward(tokens, depth, words, cache)[0]


def _as_chains(target: Target, tokens: Tensor, cache: TreeCache) -> Tensor:
    """The same by a chain along one branch, of which the root alone is accepted, and then the other branch."""
    states = torch.zeros(len(_PARENTS), target.config.hidden_size, dtype=target.dtype, device=target.device)
    first = _path(len(_PARENTS) - 2)
    for nodes in (first, _path(len(_PARENTS) - 1)[1:]):
        depth = torch.arange(len(nodes), device=target.device)[None]
        mask = causal(1, len(nodes), target.device)
        states[nodes] = target.forward(tokens[:, nodes], depth, mask, cache)[0]
        cache.advance(torch.ones(1, dtype=torch.int64, device=target.device))
    return states


def _check_attended(target: Target, cache: TreeCache) -> None:
    own = getattr(target.config, "_attn_implementation", None)
    if own == "sdpa" and any(attended.softcap for attended in cache.attended.values()):
        raise UnsupportedTarget(
            f"{type(target.model).__name__} caps its scores, which transformers leaves out under sdpa, as the model is "
            'set, so that its texts are not those the cap gives; allowed: model.set_attn_implementation("eager")'
        )
    if not cache.attended and any(one.heads for one in cache.kept):
        raise UnsupportedTarget(
            f"{type(target.model).__name__} does not take registered attention functions; allowed: "
            "models that go through transformers' AttentionInterface"
        )


def _allowed(target: Target, noise: float) -> float:
    allowed = _DIFFERENCE[target.dtype]
    if target.dtype == torch.float32 and not target.is_int8:
        return _TF32 if target.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else allowed
    if target.is_int8:
        allowed = _INT8
    return max(allowed, _NOISE * noise)


def difference(have: Tensor, want: Tensor) -> float:
    """How far states [.., d] are from others: the largest norm of a difference, as a share of the others' mean norm."""
    have, want = have.float(), want.float()
    return float((have - want).norm(dim=-1).max() / want.norm(dim=-1).mean().clamp(min=1e-30))


def _refuse_over(allowed: float, have: Tensor, want: Tensor, target: Target, where: str) -> None:
    if (found := difference(have, want)) > allowed or found != found:
        raise UnsupportedTarget(
            f"{type(target.model).__name__} gives other states for {where} than for that text alone (they differ by "
            f"{100 * found:.2g}%), so its texts would not be those of plain decoding; allowed: models whose tokens "
            "see those before them that the mask says, and no more (no mask of the model's own, no tokens "
            "that see later ones, no activations quantised by scales that rows share)"
        )
