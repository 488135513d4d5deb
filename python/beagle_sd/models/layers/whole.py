"""Decoder layers in decoding: few rows on a CPU go through `decoder_layer`, one op a layer, where it gives what the
layer's own modules give.

What a family is made of is read off its modules - which projections, norms, scales - and how it attends off the call
that its own attention makes on first use. Then the op's result is compared with the layer's own: only a layer whose
results are the same but for rounding is taken over; any other runs as its model has it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from beagle_kernels.compiled.decoder_layer import Layers, Parts
from beagle_kernels.decoder_layer import flat
from beagle_kernels.extension import _C, multiplies_bf16
from beagle_sd.models.cache import TreeCache
from beagle_sd.models.layers.attention import Attended, cache_being_read, seen
from beagle_sd.models.layers.int8 import Int8Linear
from beagle_sd.models.layers.linears import few_rows, served
from beagle_sd.models.layers.weights import NotTaken, check_dtypes, hooked, weights_of

_ROUNDING = {torch.float32: (1e-4, 2e-6), torch.bfloat16: (0.05, 0.01), torch.float16: (0.01, 2e-3)}
"""How far a layer's result may be from its own modules', as shares of what the layer adds and of what comes out."""
_WIDE = _C is not None and _C.instruction_set.startswith("avx512")
MOST = {torch.float32: 512 if _WIDE else 32, torch.bfloat16: 256 if multiplies_bf16() else 8}
"""Rows up to which a whole layer is faster than its modules are with a library's products, prompts included."""
MOST_INT8 = 512
_POSITIONS, _FAR = ("position_ids", "cache_position"), 1 << 20
_GIVEN = {
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "cache_position",
    "cache",
    "past_key_values",
    "use_cache",
    "is_causal",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
"""What models give their layers that says nothing more, or says what the op goes by."""
_INT8 = (0.05, 0.01)
"""With weights in int8: rounded to integers, activations fall otherwise with the last bit of what comes before."""
_verdicts: WeakKeyDictionary[nn.Module, tuple[tuple, Verdict]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Verdict:
    """Whether a layer is taken over: what its attention was given (scale, softcap), and whether it was given just what
    the layer before it gave; or why it is not."""

    scale: float = 1.0
    softcap: float | None = None
    follows: bool = False
    why_not: str | None = None


class Passed(NamedTuple):
    """What went through layers `first` to `last` last in a forward, by the op or as a model has it."""

    first: int
    last: int
    states: Tensor
    words: Tensor
    angles: Any


def take_over(layers: dict[nn.Module, nn.Module]) -> None:
    """Give those of a view's modules that are decoder layers, on a CPU that the extension serves, a forward that takes
    few rows through the op. layers: each module with the model's own, over the same weights."""
    taken = [WholeLayer(layer, original) for layer, original in layers.items() if served() and _is_layer(layer)]
    for layer in taken:
        layer.layer.__dict__["forward"] = layer
    for layer, after in zip(taken, taken[1:]):
        if after.index == layer.index + 1:
            layer.after = after


def described(view: nn.Module) -> str | None:
    """How a view's decoder layers run where few rows come: how many as one op, and why the others by their modules;
    None where none has been tried."""
    forwards = [module.__dict__.get("forward") for module in view.modules()]
    verdicts = [one.verdict for one in forwards if isinstance(one, WholeLayer)]
    reasons = Counter(verdict.why_not for verdict in verdicts if verdict is not None)
    if not verdicts and served() and next(view.parameters()).device.type == "cpu":
        return "all by their modules (none has an attention and an MLP where Llama's layers have them)"
    if not reasons:
        return None
    whole = reasons.pop(None, 0)
    others = [f"{count} by their modules ({reason})" for reason, count in reasons.items()]
    return ", ".join([f"{whole} as one op", *others])


def _is_layer(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    known = hasattr(module, "mlp") and type(getattr(attention, "layer_idx", None)) is int
    return known and not hooked(module) and next(module.parameters(), None) is not None


class WholeLayer:
    """The forward of one decoder layer. The first of several that follow each other runs them all in one call, and
    those after it hand its states on."""

    def __init__(self, layer: Any, original: nn.Module):
        self.layer, self.original = layer, original
        self.own = type(layer).forward.__get__(layer)
        self.attention: Any = layer.self_attn
        self.index: int = self.attention.layer_idx
        self.first = next(
            (one._parameters, name) for one in layer.modules() for name, it in one._parameters.items() if it is not None
        )
        self.made_of = tuple((id(one), hooked(one)) for one in original.modules())
        self.int8 = any(isinstance(module, Int8Linear) for module in layer.modules())
        self.after: WholeLayer | None = None
        self.known: tuple[WholeLayer, Layers] | None = None  # the last of those that run together, and what runs them

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_being_read()
        passed: Passed | None = None if cache is None else cache.passed
        if passed is not None and passed.first < self.index <= passed.last:
            if passed.states is not hidden_states:
                raise RuntimeError(f"{type(self.layer).__name__} {self.index} was given other states than on first use")
            return hidden_states
        words, angles = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if cache is None or words is None or args or not self._few(hidden_states, words, angles, cache):
            return self.own(hidden_states, *args, **kwargs)
        verdict = self.verdict
        if verdict is None:
            alike = hidden_states.shape[1] == 1 and not int(cache.lengths.max())  # as any rotation leaves them
            return self.own(hidden_states, **kwargs) if alike else self._try(hidden_states, cache, kwargs)
        if verdict.why_not is not None:
            return self.own(hidden_states, **kwargs)
        last, layers = self.known = self.known or self._together(cache, verdict)
        states = self._run(layers, last, hidden_states, words, angles, cache)
        cache.passed = Passed(self.index, last.index, states, words, angles)
        cache.attended.setdefault(id(self.attention), Attended(verdict.scale, verdict.softcap, None))
        return states

    def _few(self, x: Tensor, words: Tensor, angles: Any, cache: TreeCache) -> bool:
        known = words.dtype == torch.int64 and isinstance(angles, tuple)
        # what only stands for a tensor has no values to compare
        return known and type(x) is Tensor and few_rows(x, MOST_INT8 if self.int8 else MOST.get(x.dtype, 0))

    @property
    def verdict(self) -> Verdict | None:
        """What first use found; None before it, and when the layer has changed since."""
        known = _verdicts.get(self.original)
        return known[1] if known is not None and known[0] == self._used_as() else None

    def _used_as(self) -> tuple:
        parameters, name = self.first
        weight = parameters[name]
        return weight.dtype, weight.device, weight.data_ptr(), self.made_of

    def _try(self, x: Tensor, cache: TreeCache, kwargs: dict[str, Any]) -> Any:
        """The layer's own result, with which the op's is compared."""
        want = self.own(x, **kwargs)
        words, angles = kwargs["attention_mask"], kwargs["position_embeddings"]
        passed: Passed | None = cache.passed
        follows = passed is not None and passed.last == self.index - 1
        if passed is not None:
            follows &= passed.states is x and passed.words is words and passed.angles is angles
        try:
            if unknown := sorted(name for name, given in kwargs.items() if name not in _GIVEN and given is not None):
                raise NotTaken(f"its layers are given {', '.join(unknown)}")
            if not isinstance(want, Tensor):
                raise NotTaken(f"its layers return a {type(want).__name__}")
            if any(one.dim() != 3 or one.shape[0] not in (1, len(x)) for one in angles):
                raise NotTaken("its rotary angles are not one set a position")
            cache.passed = Passed(self.index, self.index, want, words, angles)
            given = cache.attended.get(id(self.attention))
            if given is None or given.unlike is not None:
                raise NotTaken(given.unlike if given is not None else "its attention is its own")
            verdict = Verdict(given.scale, given.softcap, follows)
            have = self._run(Layers([self._parts(cache, verdict)]), self, x, words, angles, cache)
            allowed = _INT8 if self.int8 else _ROUNDING[x.dtype]
            _compare(x, have, want, *allowed, "the op's result")
            _compare(x, self.own(x, **_moved(kwargs)), want, *allowed, "at other positions, its angles the same, it")
        except (NotTaken, AttributeError, TypeError, ValueError, IndexError) as reason:
            # what the modules turn out not to be as they are named
            verdict = Verdict(
                why_not=str(reason) if isinstance(reason, NotTaken) else f"{type(reason).__name__}: {reason}"
            )
            want = self.own(x, **kwargs)  # whose keys the op may have written over
        _verdicts[self.original] = self._used_as(), verdict
        return want

    def _parts(self, cache: TreeCache, verdict: Verdict) -> Parts:
        if not cache.keeps(self.index):
            raise NotTaken("it keeps no keys of its own")
        keys, weights = cache.layer(self.index)[0], weights_of(self.layer)
        check_dtypes(weights, keys.dtype)
        queries, width = weights.q.weight.shape
        sizes = keys.dtype, width, queries // keys.shape[3], keys.shape[1], keys.shape[3]
        turned = bool(getattr(self.attention, "use_rope", True))
        return Parts(sizes, *flat(weights), verdict.scale, verdict.softcap, turned=turned)

    def _together(self, cache: TreeCache, verdict: Verdict) -> tuple[WholeLayer, Layers]:
        """This layer and those after it that are given just what it gives, and see as far back."""
        members, parts, span = [self], [self._parts(cache, verdict)], cache.span_of(self.index, None)
        while (after := members[-1].after) is not None:
            found = after.verdict
            if found is None or not found.follows or cache.span_of(after.index, None) != span:
                break
            more = after._parts(cache, found)
            if more.sizes != parts[0].sizes:
                break
            members.append(after)
            parts.append(more)
        return members[-1], Layers(parts)

    def _run(self, layers: Layers, last: WholeLayer, x: Tensor, words: Tensor, angles: Any, cache: TreeCache) -> Tensor:
        span = cache.span_of(self.index, None)
        visible, starts = cache.once(("seen", span), lambda: seen(words[:, 0], cache.lengths, cache.depth, span))
        cos, sin = (one.to(x.dtype) for one in angles)
        if cos.shape[0] != x.shape[0]:
            cos, sin = cos.expand(len(x), -1, -1), sin.expand(len(x), -1, -1)
        planes = [plane for index in range(self.index, last.index + 1) for plane in cache.layer(index)]
        return layers(x, cos, sin, planes, cache.lengths, visible, cache.table(span), starts, ends=cache.ends)


def _moved(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same at other positions, but for the rotary angles, which are given."""
    return {name: given + _FAR if name in _POSITIONS and given is not None else given for name, given in kwargs.items()}


def _compare(x: Tensor, have: Tensor, want: Tensor, of_added: float, of_all: float, what: str) -> None:
    x, have, want = x.float(), have.float(), want.float()
    allowed = of_added * (want - x).norm(dim=-1) + of_all * want.norm(dim=-1)
    apart = (have - want).norm(dim=-1)
    if not bool((apart <= allowed).all()):
        raise NotTaken(f"{what} differs by {float((apart / want.norm(dim=-1)).max()):.1e} from its own")
