"""The fastest tiles of the Triton kernels on this GPU beside the shipped ones: python -m bench.tuning OUT

Runs the package's own tuners on the benchmark's shapes, a head size at a time. `python -m bench --tuned OUT` measures
with what was found, `python -m bench.report --configs OUT` prints the lines of beagle_kernels/triton/configs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import bench_block_attention, bench_tree_attention

SHAPES = {
    # size -> (head size, rows, query heads, key heads) of block_attention, (batch, nodes, prefix) of tree_attention
    "full": [((128, 8192, 32, 8), (8, 64, 2**15)), ((64, 8192, 32, 8), (8, 64, 2**15))],
    "tiny": [((16, 24, 2, 1), (1, 4, 20))],
}
WORKERS = 12
"""Processes that compile the candidates beforehand, into Triton's cache on disk: one after the other takes minutes."""


def calls(size: str, number: int, device: str) -> dict[str, Callable]:
    """One shape's calls by the op that they tune: "time" runs it, "tune" tunes its kernels; see `found`."""
    from beagle_kernels import block_attention, tree_attention
    from beagle_kernels.triton.block_attention import tune_block_attention
    from beagle_kernels.triton.tree_attention import tune_tree_attention

    (width, rows, hq, hkv), (batch, nodes, prefix) = SHAPES[size][number]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = bench_block_attention.drawn(rows, hq, hkv, width, device, dtype)
    offset = torch.tensor([bench_block_attention.OFFSET], dtype=torch.int32, device=device)
    window, up = bench_block_attention.WINDOW, torch.randn_like(q)
    tree = bench_tree_attention.drawn(batch, nodes, prefix, hq, hkv, width, device, dtype)
    mask = bench_tree_attention.random_trees(batch, nodes).to(device)
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=device)

    def forward() -> torch.Tensor:
        return block_attention(q, k, v, window, offset, backend="triton")[0]

    out = forward()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, (q, k, v), up, retain_graph=True),
        "tree": lambda: tree_attention(*tree, lengths, mask, backend="triton"),
        "tune": lambda: tune_block_attention(q.detach(), k.detach(), v.detach(), window, offset)
        | {"tree": tune_tree_attention(*tree, lengths, mask)},
    }


TIMED_BY = {"block_forward": "forward", "block_dq": "backward", "block_dkv": "backward", "tree": "tree"}
"""The call whose time a kernel's tiles are judged by; both kernels of the backward share one."""


def found(size: str, number: int, device: str) -> list[dict]:
    """The winners for one shape, each with its call's time under the shipped tiles and under all the winners."""
    from beagle_kernels.triton import configs
    from beagle_kernels.triton.block_attention import block_d

    run = calls(size, number, device)
    width, dtype = block_d(SHAPES[size][number][0][0]), torch.bfloat16 if device == "cuda" else torch.float32
    arch = configs.architecture(torch.device(device))
    shipped = {kernel: configs.choose(kernel, arch, width, dtype) for kernel in TIMED_BY}
    before = {name: seconds(run[name]) for name in set(TIMED_BY.values())}
    best = run["tune"]()
    after = {name: seconds(run[name]) for name in set(TIMED_BY.values())}
    return [
        {"kernel": kernel, "arch": arch, "head_size": width, "dtype": str(dtype)[6:], "config": list(best[kernel]),
         "shipped": list(shipped[kernel]), "timed": TIMED_BY[kernel], "shipped_ms": before[TIMED_BY[kernel]],
         "tuned_ms": after[TIMED_BY[kernel]], "shape": SHAPES[size][number]}
        for kernel in TIMED_BY
    ]  # fmt: skip


def seconds(run: Callable) -> float:
    """Milliseconds of one call, the median."""
    import triton

    return triton.testing.do_bench(run, return_mode="median")


def use(entries: list[dict]) -> None:
    """Let the kernels take these tiles in this process."""
    from beagle_kernels.triton import configs

    for entry in entries:
        key = entry["kernel"], entry["arch"], entry["head_size"], getattr(torch, entry["dtype"])
        configs._tuned[key] = configs.Config(*entry["config"])


def compile_candidates(size: str, worker: int) -> None:
    """Run every WORKERS-th candidate once, so that its kernels are in Triton's cache, but for those that do not fit."""
    import triton

    from beagle_kernels.triton import configs

    for number, ((width, *_), _) in enumerate(SHAPES[size]):
        run = calls(size, number, "cuda")
        keys = [(kernel, configs.architecture(torch.device("cuda")), width, torch.bfloat16) for kernel in TIMED_BY]
        for config in configs.CANDIDATES[worker::WORKERS]:
            for key in keys:
                configs._tuned[key] = config
            for name in ("forward", "backward", "tree"):
                try:
                    run[name]()
                except triton.runtime.errors.OutOfResources:
                    continue


def on_the_host(run: Callable, **options) -> float:
    """do_bench for the interpreter, which has no GPU's clock."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the JSON to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: Triton's interpreter, tiny")
    parser.add_argument("--compile", type=int, metavar="WORKER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = "full" if options.device == "cuda" else "tiny"
    if options.compile is not None:
        compile_candidates(size, options.compile)
        return 0
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        import triton

        triton.testing.do_bench = on_the_host
        torch.cuda.is_current_stream_capturing = lambda: False  # a torch without CUDA cannot say
    else:
        command = [sys.executable, "-m", "bench.tuning", "--compile"]
        workers = [subprocess.Popen([*command, str(worker)]) for worker in range(WORKERS)]
        if failed := [number for number, worker in enumerate(workers) if worker.wait()]:
            print(f"compilers {failed} of {WORKERS} failed; what they did not compile is compiled while tuning")
    entries = []
    for number in range(len(SHAPES[size])):
        entries += found(size, number, options.device)
        if options.out:
            options.out.write_text(json.dumps(entries, indent=1) + "\n")
    for entry in entries:
        print(f"{entry['kernel']:14} head {entry['head_size']}: {entry['config']} instead of {entry['shipped']}, "
              f"{entry['timed']} {entry['tuned_ms']:.3f} ms instead of {entry['shipped_ms']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
