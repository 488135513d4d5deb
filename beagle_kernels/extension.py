"""The compiled executors of the verification ops: the "cpu" and "cuda" backends over `beagle_kernels._C`.

The extension is optional: without it the reference serves. It takes pointers, sizes, strides, and the number of
threads or the stream; outputs and workspaces are allocated here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .accept_tree import empty_verdict
from .backends import BackendError, device_index, implementation

try:
    from . import _C

    _CODES = _C.dtypes
except (ImportError, AttributeError) as error:  # the latter from one that was built of older sources
    _C, _CODES, _WHY = None, {}, str(error)  # type: ignore[assignment]

BUILD = "build it with 'pip install .' or 'python setup.py build_ext --inplace'"


class _Codes(dict):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise TypeError(f"the compiled executors were given {dtype}; allowed: {', '.join(map(str, self))}")


DTYPES = _Codes({getattr(torch, name): code for name, code in _CODES.items()})
"""The extension's number for each dtype that it takes."""
LONG_ROW = 16384
"""Tokens from which rows are split over CPU threads, if there are fewer rows than threads."""


def missing_cpu(device: torch.device) -> str | None:
    """Why the host executor cannot serve tensors on the device."""
    if _C is None:
        return f"the extension is not built ({_WHY}); {BUILD}"
    return None if device.type == "cpu" else "it takes CPU tensors"


def missing_cuda(device: torch.device) -> str | None:
    """Why the CUDA executor cannot serve tensors on the device."""
    if _C is None:
        return f"the extension is not built ({_WHY}); {BUILD}"
    if not hasattr(_C, "cuda"):
        return f"the extension has no CUDA half: {_C.no_cuda}"
    return _unserved(device_index(device)) if device.type == "cuda" else "it takes CUDA tensors"


@functools.cache
def _unserved(index: int) -> str | None:
    """Why the kernels cannot run on the CUDA device of this number: its driver is asked, once."""
    # torch's own way there and back makes no context on the device that was current
    with torch.cuda.device(index) if index < torch.cuda.device_count() else contextlib.nullcontext():
        why = _C.cuda.why_not(index)
    return why and f"the extension's kernels cannot run on cuda:{index}: {why}"


def compiled(op: str):
    """Register the decorated function for both executors."""

    def register(function):
        implementation(op, "cpu", missing_cpu)(function)
        return implementation(op, "cuda", missing_cuda)(function)

    return register


@contextlib.contextmanager
def _on(device: torch.device):
    with torch.cuda.device(device):
        yield _C.cuda, torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _with(threads: int):
    return contextlib.nullcontext((_C.cpu, threads))


def executor(device: torch.device):
    """A context that gives the executor's module and the threads or stream to run on."""
    return _on(device) if device.type == "cuda" else _with(torch.get_num_threads())


def chunks_of(rows: int, vocab: int, device: torch.device) -> int:
    """Parts a row is split into: by length on CUDA, to feed idle threads on the CPU."""
    if device.type == "cuda":
        return max(1, -(-vocab // _C.chunk))
    threads = torch.get_num_threads()
    return 1 if rows >= threads or vocab < LONG_ROW else min(-(-threads // max(rows, 1)), vocab // (LONG_ROW // 2))


def allow(op: str, name: str, value: int, most: int, device: torch.device) -> None:
    """Raise BackendError for what the CUDA kernels have no room for; the other executors take any number."""
    if value > most and device.type == "cuda":
        raise BackendError(f"{op}: {name} is {value}; allowed by backend 'cuda': up to {most}")


def dense(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def flat(*tensors: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors made contiguous, to be kept alive, and their addresses."""
    kept = [*map(Tensor.contiguous, tensors)]
    return kept, addresses(kept)


def addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The addresses of contiguous tensors."""
    return tuple(map(Tensor.data_ptr, tensors))


def address(tensor: Tensor | None) -> int:
    """A contiguous tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous; None stays."""
    return None if tensor is None else tensor.contiguous()


@compiled("choose_tokens")
def choose_tokens(
    logits: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: int = 0,
    rounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    logits, positions, rounds = dense(logits), positions.contiguous(), contiguous(rounds)
    tokens, status = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)
    if rows == 0:
        return tokens, status
    chunks = chunks_of(rows, vocab, logits.device)
    keys, flags = positions.new_empty(rows * chunks), status.new_empty(rows * chunks)
    kept, knobs = flat(seed, temperature, top_k, top_p, min_p)
    with executor(logits.device) as (module, where):
        module.choose_tokens(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            positions.data_ptr(),
            knobs,
            stream,
            address(rounds),
            keys.data_ptr(),
            flags.data_ptr(),
            chunks,
            tokens.data_ptr(),
            status.data_ptr(),
        )
    return tokens, status


@compiled("top_candidates")
def top_candidates(
    logits: Tensor,
    k: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    logits, positions, token_ids = dense(logits), positions.contiguous(), contiguous(token_ids)
    tokens, scores = positions.new_empty(rows, k), positions.new_empty(rows, k, dtype=torch.float32)
    if rows == 0:
        return tokens, scores
    allow("top_candidates", "k", k, _C.max_k, logits.device)
    allow("top_candidates", "the number of rows", rows, _C.max_rows, logits.device)
    chunks = chunks_of(rows, vocab, logits.device) if logits.is_cuda else 2
    keys, sums = positions.new_empty(rows * chunks * k), scores.new_empty(rows * chunks * 2)
    kept, knobs = flat(seed, temperature, top_k, top_p, min_p)
    with executor(logits.device) as (module, where):
        module.top_candidates(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            k,
            positions.data_ptr(),
            knobs,
            address(token_ids),
            keys.data_ptr(),
            sums.data_ptr(),
            chunks,
            tokens.data_ptr(),
            scores.data_ptr(),
        )
    return tokens, scores


@compiled("build_tree")
def build_tree(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, num_nodes: int, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, candidates = tokens.shape
    words = (num_nodes + 63) // 64
    out_tokens, mask = root.new_empty(batch, num_nodes), root.new_empty(batch, num_nodes, words)
    out_parents, depth = parents.new_empty(batch, num_nodes), parents.new_empty(batch, num_nodes)
    size, label = parents.new_empty(batch), parents.new_empty(batch * candidates)
    kept, inputs = flat(root, tokens, scores, parents)
    with executor(root.device) as (module, where):
        module.build_tree(
            where,
            *inputs,
            batch,
            candidates,
            num_nodes,
            words,
            max_depth,
            label.data_ptr(),
            out_tokens.data_ptr(),
            out_parents.data_ptr(),
            depth.data_ptr(),
            mask.data_ptr(),
            size.data_ptr(),
        )
    return out_tokens, out_parents, depth, mask, size


@compiled("accept_tree")
def accept_tree(
    tokens: Tensor, parents: Tensor, depth: Tensor, mask: Tensor, size: Tensor, max_depth: int, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    verdict = empty_verdict(tokens, size, max_depth)
    kept, (*fields, choice) = flat(tokens, parents, depth, mask, size, chosen)
    tree = (*fields, tokens.shape[1], mask.shape[2], max_depth)
    with executor(tokens.device) as (module, where):
        module.accept_tree(where, tree, len(tokens), choice, addresses(verdict))
    return verdict


@compiled("verify_tree")
def verify_tree(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    depth: Tensor,
    mask: Tensor,
    size: Tensor,
    max_depth: int,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, nodes), vocab = tokens.shape, logits.shape[2]
    allow("verify_tree", "the number of rows", batch, _C.max_rows, logits.device)
    logits, verdict = dense(logits), empty_verdict(tokens, size, max_depth)
    chunks = chunks_of(batch * nodes, vocab, logits.device)
    # one workspace: the keys, then the flags
    rows = batch * nodes * chunks
    keys = tokens.new_empty(rows + (rows + 1) // 2)
    kept, (at, *given) = flat(positions, tokens, parents, depth, mask, size, seed, temperature, top_k, top_p, min_p)
    tree, knobs = (*given[:5], nodes, mask.shape[2], max_depth), tuple(given[5:])
    with executor(logits.device) as (module, where):
        module.verify_tree(
            where,
            logits.data_ptr(),
            DTYPES[logits.dtype],
            batch,
            vocab,
            logits.stride(0),
            logits.stride(1),
            tree,
            at,
            knobs,
            keys.data_ptr(),
            keys.data_ptr() + 8 * rows,
            chunks,
            addresses(verdict),
        )
    return verdict


@compiled("verify_chain")
def verify_chain(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_tokens: Tensor,
    positions: Tensor,
    seed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    rule: str = "token",
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, steps), vocab = draft_tokens.shape, target_logits.shape[2]
    allow("verify_chain", "the number of rows", batch, _C.max_rows, target_logits.device)
    if target_logits.dtype != draft_logits.dtype:
        target_logits, draft_logits = target_logits.float(), draft_logits.float()
    target, draft, token_ids = dense(target_logits), dense(draft_logits), contiguous(token_ids)
    verdict = empty_verdict(draft_tokens, top_k, steps)
    laws = torch.empty(batch * (2 * steps + 1) * _C.law_size, dtype=torch.uint8, device=target.device)
    kept, (drafted, at, *knobs) = flat(draft_tokens, positions, seed, temperature, top_k, top_p, min_p)
    strides = (*target.stride()[:2], *draft.stride()[:2])
    with executor(target.device) as (module, where):
        module.verify_chain(
            where,
            target.data_ptr(),
            draft.data_ptr(),
            DTYPES[target.dtype],
            batch,
            steps,
            vocab,
            draft.shape[2],
            strides,
            drafted,
            at,
            tuple(knobs),
            rule == "block",
            address(token_ids),
            laws.data_ptr(),
            addresses(verdict),
        )
    return verdict


@compiled("compact_cache_")
def compact_cache_(
    cache: Tensor, path: Tensor, num_accepted: Tensor, lengths: Tensor, block_table: Tensor | None = None
) -> None:
    layers, _, rows, heads, slots, size = cache.shape
    allow("compact_cache_", "the number of rows", len(path), _C.max_rows, cache.device)
    item = cache.element_size()
    kept, (path_at, *counts) = flat(path, num_accepted, lengths)
    block_table = contiguous(block_table)
    strides = tuple(stride * item for stride in cache.stride()[:5])
    with executor(cache.device) as (module, where):
        module.compact_cache(
            where,
            cache.data_ptr(),
            layers,
            len(path),
            heads,
            slots,
            size * item,
            strides,
            rows,
            0 if block_table is None else block_table.shape[1],
            path_at,
            path.shape[1],
            *counts,
            address(block_table),
        )


@implementation("skinny_linear", "cpu", missing_cpu)
def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    outputs, width = weight.shape
    rows = x.reshape(-1, width) if width else x.new_empty(x.shape[:-1].numel(), 0)
    rows, weight = dense(rows), dense(weight)
    out = x.new_empty(*x.shape[:-1], outputs)
    _C.cpu.skinny_linear(
        torch.get_num_threads(),
        rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        len(rows),
        outputs,
        width,
        rows.stride(0),
        weight.stride(0),
    )
    return out
