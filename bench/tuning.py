"""The fastest tiles of the Triton kernels on this GPU beside the shipped ones: python -m bench.tuning OUT

A stage's candidates are first compiled by processes side by side, into Triton's cache on disk; what they could compile
and run is then timed by the package's own tuner, on the benchmark's shapes, and each winner is written as soon as it
is found. `python -m bench --tuned OUT` measures with what was found, `python -m bench.report --configs OUT` prints the
lines of beagle_kernels/triton/configs.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from bench.ops import bench_block_attention, bench_tree_attention
from bench.processes import started

if TYPE_CHECKING:
    from beagle_kernels.triton.configs import Config


class Shape(NamedTuple):
    """What block_attention is tuned on, and tree_attention's (batch, nodes, prefix) of many and of few rows where that
    is tuned too."""

    dtype: torch.dtype
    head_size: int
    rows: int
    heads: tuple[int, int]
    tree: tuple[int, int, int] | None = None
    tree_few: tuple[int, int, int] | None = None


BLOCK = {"block_forward": "forward", "block_dq": "backward", "block_dkv": "backward"}
TREE = {"tree": "tree", "tree_few": "tree of few rows"}
TIMED_BY = {**BLOCK, **TREE}
"""The call whose time a kernel's tiles are judged by; both kernels of the backward share one."""
LARGE = (32, 8), (8, 64, 2**15), (8, 16, 2**15)
STAGES = {
    # size -> stages; float32, whose kernels take longest to compile, keeps nothing else waiting
    "full": [
        [Shape(torch.bfloat16, width, 8192, *LARGE) for width in (128, 64)],
        [Shape(torch.float32, width, 2048, (32, 8)) for width in (128, 64)],
    ],
    "tiny": [[Shape(torch.float16, 16, 24, (2, 1), (1, 40, 20), (1, 4, 20))], [Shape(torch.float32, 16, 24, (2, 1))]],
}
FIRST = " first"
STAGES |= {size + FIRST: [stages[0][:1]] for size, stages in [*STAGES.items()]}
"""Of each size the first shape alone: the one that headline figures are measured with."""
WORKERS = 12
COMPILE_SECONDS = {"full": 90, "full" + FIRST: 60, "tiny": 240, "tiny" + FIRST: 240}
"""A stage's, by size; what is not compiled by then is not tried."""


class Trial(NamedTuple):
    """One candidate of one kernel at one shape."""

    shape: Shape
    kernel: str
    config: Config


def kernels(shape: Shape) -> list[str]:
    return [*BLOCK, *(kernel for kernel in TREE if getattr(shape, kernel))]


def key_of(shape: Shape, kernel: str, device: str) -> tuple[str, int, int, torch.dtype]:
    """The key of the kernel in the tables."""
    from beagle_kernels.triton import configs
    from beagle_kernels.triton.tiles import block_d

    return kernel, configs.architecture(torch.device(device)), block_d(shape.head_size), shape.dtype


def shipped(key: tuple[str, int, int, torch.dtype]) -> Config:
    from beagle_kernels.triton import configs

    return configs.choose(*key, tma=key[1] >= 90)


def trials(shapes: list[Shape], device: str) -> list[Trial]:
    """All of a stage, in an order that every process agrees on."""
    from beagle_kernels.triton.configs import candidates

    return [
        Trial(shape, kernel, config)
        for shape in shapes
        for kernel in kernels(shape)
        for config in candidates(*key_of(shape, kernel, device))
    ]


def share_of(found: list[Trial], worker: int, workers: int) -> list[Trial]:
    """A worker's share."""
    return found[worker::workers]


@cache
def block_calls(shape: Shape, device: str) -> dict[str, Callable[[], object]]:
    from beagle_kernels import block_attention

    q, k, v = bench_block_attention.drawn(shape.rows, *shape.heads, shape.head_size, device, shape.dtype)
    offset = torch.tensor([bench_block_attention.OFFSET], dtype=torch.int32, device=device)
    up = torch.randn_like(q)

    def forward() -> torch.Tensor:
        return block_attention(q, k, v, bench_block_attention.WINDOW, offset, backend="triton")[0]

    out = forward()
    return {"forward": forward, "backward": lambda: torch.autograd.grad(out, (q, k, v), up, retain_graph=True)}


@cache
def tree_call(shape: Shape, kernel: str, device: str) -> Callable[[], object]:
    from beagle_kernels import tree_attention

    batch, nodes, prefix = getattr(shape, kernel)
    q, k, v = bench_tree_attention.drawn(batch, nodes, prefix, *shape.heads, shape.head_size, device, shape.dtype)
    mask = bench_tree_attention.random_trees(batch, nodes).to(device)
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=device)
    return lambda: tree_attention(q, k, v, lengths, mask, backend="triton")


def call_of(shape: Shape, kernel: str, device: str) -> Callable[[], object]:
    """The call that launches the kernel at this shape."""
    return tree_call(shape, kernel, device) if kernel in TREE else block_calls(shape, device)[TIMED_BY[kernel]]


def compile_share(found: list[Trial], device: str, notes: Path) -> None:
    """Run each candidate once, so that its kernel is in Triton's cache, and note for each, a line of JSON, how that
    ended: whatever is wrong with one, the next is tried, by a new process where this one's GPU context is lost."""
    from beagle_kernels.triton import configs

    known = len(notes.read_text().splitlines()) if notes.exists() else 0
    for trial in found[known:]:
        key, why = key_of(trial.shape, trial.kernel, device), None
        try:
            configs._tuned[key] = trial.config
            call_of(trial.shape, trial.kernel, device)()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            configs._tuned.pop(key, None)
        with notes.open("a") as file:
            file.write(json.dumps([trial.kernel, trial.shape.head_size, list(trial.config), why]) + "\n")
        if why and device == "cuda" and context_is_lost():
            os.execv(sys.executable, [sys.executable, "-m", "bench.tuning", *sys.argv[1:]])


def context_is_lost() -> bool:
    """Whether a kernel's fault has ended this process's use of the GPU."""
    try:
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError:
        return True
    return False


def compile_stage(size: str, stage: int, device: str) -> dict[tuple[str, int], dict[Config, str | None]]:
    """What became of a stage's candidates, by kernel and head size: None or the reason; those are left out that were
    not compiled in time, or whose process died."""
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, "-m", "bench.tuning", "--device", device, "--worker", size, str(stage)]
        processes = [
            stack.enter_context(started([*command, str(worker), str(workers), f"{folder}/{worker}"]))
            for worker in range(workers)
        ]
        ends = time.monotonic() + COMPILE_SECONDS[size]
        while time.monotonic() < ends and any(worker.poll() is None for worker in processes):
            time.sleep(0.1)
        codes = [worker.poll() for worker in processes]
        lines = [line for file in sorted(Path(folder).iterdir()) for line in file.read_text().splitlines()]
    if any(codes):
        print(f"compilers ended with {codes}; what they did not compile is not tried")
    return read_notes(lines)


def read_notes(lines: list[str]) -> dict[tuple[str, int], dict[Config, str | None]]:
    """The notes of all workers, by kernel and head size."""
    from beagle_kernels.triton import configs

    found: dict[tuple[str, int], dict[Config, str | None]] = {}
    for line in lines:
        kernel, width, config, why = json.loads(line)
        found.setdefault((kernel, width), {})[configs.Config(*config)] = why
        if why:
            print(f"  {kernel}, head {width}, {config}: {why}")
    return found


def winner(shape: Shape, kernel: str, tried: dict[Config, str | None], device: str) -> dict:
    """The fastest candidate, used from here on, and its call's time under it and under the shipped one."""
    from beagle_kernels.triton import configs

    key, run = key_of(shape, kernel, device), call_of(shape, kernel, device)
    first, before = shipped(key), milliseconds(run)
    # where no process noted anything, the candidates are compiled here
    able = [config for config in configs.candidates(*key) if tried.get(config, "not compiled") is None]
    best = configs.tune(*key, run, able if tried else None)
    return {
        "kernel": kernel,
        "arch": key[1],
        "head_size": key[2],
        "dtype": str(shape.dtype)[6:],
        "config": list(best),
        "shipped": list(first),
        "timed": TIMED_BY[kernel],
        "shipped_ms": before,
        "tuned_ms": milliseconds(run),
        "shape": [shape.rows, *shape.heads] if kernel in BLOCK else [*getattr(shape, kernel), *shape.heads],
        "refused": {" x ".join(map(str, config)): why for config, why in tried.items() if why},
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call, the median."""
    import triton

    return triton.testing.do_bench(run, return_mode="median")


def use(entries: list[dict]) -> None:
    """Let the kernels take these tiles in this process."""
    from beagle_kernels.triton import configs

    for entry in entries:
        key = entry["kernel"], entry["arch"], entry["head_size"], getattr(torch, entry["dtype"])
        configs._tuned[key] = configs.Config(*entry["config"])


def label(entries: list[dict]) -> str | None:
    """A name for tiles that others are measured with: the same for the same tiles, None where all are the shipped."""
    keys = ("kernel", "arch", "head_size", "dtype", "config")
    found = sorted([entry[key] for key in keys] for entry in entries if entry["config"] != entry.get("shipped"))
    return f"tuned {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:6]}" if found else None


def use_interpreter() -> None:
    """Triton's interpreter, and a clock for it: it has no GPU's."""

    def on_the_host(run: Callable, **options) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.testing.do_bench = on_the_host
    torch.cuda.is_current_stream_capturing = lambda: False  # a torch without CUDA cannot say


def tune_all(size: str, device: str, out: Path | None, entries: list[dict]) -> list[str]:
    """Add what `entries` has not yet, written after each; the kernels that could not be tuned, with the reason."""
    failed: list[str] = []
    use(entries)
    for stage, shapes in enumerate(STAGES[size]):
        known = {(entry["kernel"], entry["head_size"], entry["dtype"]) for entry in entries}
        left = [
            (shape, kernel)
            for shape in shapes
            for kernel in kernels(shape)
            if (kernel, key_of(shape, kernel, device)[2], str(shape.dtype)[6:]) not in known
        ]
        tried = compile_stage(size, stage, device) if left else {}
        for shape, kernel in left:
            try:
                entry = winner(shape, kernel, tried.get((kernel, shape.head_size), {}), device)
            except Exception as error:  # a kernel's failure leaves the others their turn
                failed.append(f"{kernel}, head {shape.head_size}, {shape.dtype}: {type(error).__name__}: {error}")
                continue
            entries.append(entry)
            print(
                f"{kernel:14} head {entry['head_size']} {entry['dtype']}: {entry['config']} instead of "
                f"{entry['shipped']}, {entry['timed']} {entry['tuned_ms']:.3f} ms instead of "
                f"{entry['shipped_ms']:.3f}",
                flush=True,
            )
            if out:
                # not above: transformers imports Triton, which may have to be asked for its interpreter first
                from beagle_sd.files import write_json

                write_json(out, entries)
        block_calls.cache_clear()
        tree_call.cache_clear()
    return failed


def main(arguments: list[str]) -> int:
    """1 where a kernel could not be tuned."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the JSON to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: Triton's interpreter, tiny")
    parser.add_argument("--go-on", action="store_true", help="keep the winners that OUT has")
    parser.add_argument("--first", action="store_true", help="the first shape alone")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        use_interpreter()
    if options.worker:
        size, stage, worker, workers, notes = options.worker
        shapes = STAGES[size][int(stage)]
        compile_share(share_of(trials(shapes, options.device), int(worker), int(workers)), options.device, Path(notes))
        return 0
    kept = options.go_on and options.out and options.out.exists()
    entries = json.loads(options.out.read_text()) if kept else []
    size = ("full" if options.device == "cuda" else "tiny") + (FIRST if options.first else "")
    failed = tune_all(size, options.device, options.out, entries)
    print(*(f"not tuned: {why}" for why in failed), sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
