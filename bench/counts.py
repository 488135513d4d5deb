"""What a choice reads and draws, counted in the code of both executors: python -m bench.counts --help

Logits read a token, calls of Philox a group of 64 ids, and the share of groups that were looked into: of SmolLM2's
logits along answers to MT-Bench's prompts, and of normal random ones. The CUDA kernels run in the emulator on the host.
Needs g++ and a checkout; no GPU. It counts and takes no time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.environment import versions
from bench.processes import ROOT

BUILD = ROOT / "csrc" / "emulated.sh"


def data(rows: int) -> Iterator[tuple[str, Tensor]]:
    """A name and logits [rows, V] f32 of each kind."""
    from beagle_sd.models.loading import load_target
    from bench.answers.real_prompts import encoded_prompts

    target, tokenizer = load_target("smollm2-135m")
    each, found = 8, []
    with torch.no_grad():
        for prompt in encoded_prompts("mt-bench", tokenizer, -(-rows // each)):
            start = torch.as_tensor(prompt).view(1, -1)
            text = target.generate(start, max_new_tokens=4 * each, do_sample=False)  # type: ignore[operator]
            found.append(target(text).logits[0, -4 * each :: 4].float())
    yield "SmolLM2-135M", torch.cat(found)[:rows].contiguous()
    generator = torch.Generator().manual_seed(0)
    for vocab in (49152, 128256):
        yield f"normal random, {vocab}", torch.randn(rows, vocab, generator=generator)


def counted(program: Path, logits: Tensor, folder: Path) -> list[dict]:
    """The program's rows for these logits; RuntimeError with what it says where it fails."""
    file = folder / "logits.bin"
    file.write_bytes(logits.numpy().tobytes())
    done = subprocess.run([program, file, *map(str, logits.shape)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"counts of {[*logits.shape]} logits failed: {(done.stdout + done.stderr)[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="of logits, of each kind")
    parser.add_argument("--out", type=Path, help="write the counts there, as JSON")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}; allowed: 1 or more")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "counts"
        subprocess.run([BUILD, "counts", program, "-O2"], check=True)
        for name, logits in data(args.rows):
            for row in counted(program, logits, Path(folder)):
                rows.append({"logits": name} | row)
                print(json.dumps(rows[-1]), flush=True)
    if args.out:
        from beagle_sd.files import write_json

        write_json(args.out, {"rows": args.rows, "versions": versions("beagle_kernels", "torch"), "counts": rows})


if __name__ == "__main__":
    main()
