"""What is done to logits before a token is chosen, by the text before it, at every node of a tree.

A node's prefix is the committed text and the node's path below it. For token v of node n of row b, in f32 and in this
order, which is that of transformers' processors:

1. z + (added[b, v] + the bias of each phrase of the row whose last token is v and whose others end the prefix)
2. where v is in the prefix: z * repetition if z < 0, else z / repetition
3. where v is c > 0 times among the new tokens and the path: z - frequency * c - presence
4. -inf where v comes too soon (first), would complete an n-gram that the prefix has, or is not allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .types import Adjustments, accumulation


def adjust_logits(
    logits: Tensor,
    paths: Tensor,
    text: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    adjustments: Adjustments,
    *,
    token_ids: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The logits of each node as plain decoding would see them after the node's prefix.

    logits [B, N, V'] f32, f16 or bf16 (f64 by the reference), any strides, not changed; V' = V, or with token_ids int64
    [V'], ascending, column i is token token_ids[i]. text int64 [B, S]: text[b, :lengths[b]] is row b's, of which the
    first prompts[b] are the prompt; lengths, prompts int32 [B], what is out of bounds taken as the nearest bound. paths
    int64 [B, N, P]: the tokens of a node below the text, its own last, padded with -1 on the left. Tokens outside 0 to
    V - 1 are text to phrases and n-grams and nothing else. adjustments, B rows; allowed int32 [B, N, ceil(V / 32)],
    bit v % 32 of word v // 32 where v may come.

    Returns f32 [B, N, V'] (f64 for f64), contiguous. A NaN stays unless it is banned, -inf stays under the penalties.
    Raises ValueError or TypeError on wrong shapes and dtypes; the "cuda" backend takes B up to 65535 (BackendError).
    """
    op = "adjust_logits"
    checks.tensor(op, "logits", logits, (None, None, None), checks.FLOATS)
    batch, nodes, width = logits.shape
    checks.at_least(op, "the vocabulary of logits", width, 1)
    checks.tensor(op, "paths", paths, (batch, nodes, None), checks.INT64)
    checks.tensor(op, "text", text, (batch, None), checks.INT64)
    checks.tensor(op, "lengths", lengths, (batch,), checks.INT32)
    checks.tensor(op, "prompts", prompts, (batch,), checks.INT32)
    if token_ids is not None:
        checks.tensor(op, "token_ids", token_ids, (width,), checks.INT64)
    vocab = _vocabulary(adjustments, batch, None if token_ids is not None else width)
    if allowed is not None:
        words = None if vocab is None else (vocab + 31) // 32
        checks.tensor(op, "allowed", allowed, (batch, nodes, words), checks.INT32)
        checks.at_least(op, "the words of allowed", allowed.shape[2], 1)
    given = dict(zip(Adjustments._fields, adjustments))
    inputs = {"paths": paths, "text": text, "lengths": lengths, "prompts": prompts, **given}
    checks.same_device(op, logits=logits, **inputs, token_ids=token_ids, allowed=allowed)
    return torch.ops.beagle.adjust_logits.default(
        logits, paths, text, lengths, prompts, *adjustments, token_ids, allowed, backend
    )


def _vocabulary(adjustments: Adjustments, batch: int, vocab: int | None) -> int | None:
    """Checks the settings' shapes and dtypes, and returns V where something tells it."""
    op = "adjust_logits"
    if not isinstance(adjustments, Adjustments):
        raise TypeError(f"{op}: adjustments is a {type(adjustments).__name__}; allowed: an Adjustments")
    for name, dtypes in (("added", checks.FLOAT32), ("first", checks.INT32)):
        if (table := getattr(adjustments, name)) is not None:
            checks.tensor(op, f"adjustments.{name}", table, (batch, vocab), dtypes)
            vocab = table.shape[1]
            checks.at_least(op, f"the vocabulary of {name}", vocab, 1)
    phrases = adjustments.phrases
    checks.tensor(op, "adjustments.phrases", phrases, (None, None), checks.INT64)
    checks.tensor(op, "adjustments.phrase_bias", adjustments.phrase_bias, (phrases.shape[0],), checks.FLOAT32)
    checks.tensor(op, "adjustments.phrase_rows", adjustments.phrase_rows, (phrases.shape[0],), checks.INT32)
    for name in ("repetition", "frequency", "presence"):
        checks.tensor(op, f"adjustments.{name}", getattr(adjustments, name), (batch,), checks.FLOAT32)
    checks.tensor(op, "adjustments.ngram", adjustments.ngram, (batch,), checks.INT32)
    return vocab


@backends.operator("adjust_logits")
def _adjust_logits(
    logits: Tensor,
    paths: Tensor,
    text: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    added: Tensor | None,
    first: Tensor | None,
    phrases: Tensor,
    phrase_bias: Tensor,
    phrase_rows: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    ngram: Tensor,
    token_ids: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    tables, searched = (added, first), (phrases, phrase_bias, phrase_rows)
    numbers = (repetition, frequency, presence, ngram)
    args = (logits, paths, text, lengths, prompts, *tables, *searched, *numbers, token_ids, allowed)
    return backends.call("adjust_logits", backend, logits.device, *args)


@_adjust_logits.register_fake
def _(
    logits,
    paths,
    text,
    lengths,
    prompts,
    added,
    first,
    phrases,
    phrase_bias,
    phrase_rows,
    repetition,
    frequency,
    presence,
    ngram,
    token_ids=None,
    allowed=None,
    backend="auto",
):
    return logits.new_empty(logits.shape, dtype=accumulation(logits.dtype))
