"""Install a wheel with another torch in a clean environment and use it: python tests/try_wheel.py dist TORCH

The extension links no torch, so one wheel must serve any version of it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = """
import sys, torch, transformers
import beagle_kernels as bk, beagle_sd
from beagle_sd.models.loading import bundled_folder

folder = sys.argv[1]
assert bk.__file__.startswith(folder) and beagle_sd.__file__.startswith(folder), (bk.__file__, beagle_sd.__file__)
assert not torch.__version__.startswith(sys.argv[2]), f"torch {torch.__version__} is what the wheel was built beside"
cpu = torch.device("cpu")
for op in ("choose_tokens", "top_candidates", "build_tree", "accept_tree", "verify_tree", "verify_chain",
           "compact_cache_", "tree_attention"):
    assert (reason := bk.backends.why_not(op, "cpu", cpu, torch.float32)) is None, (op, reason)

draft = beagle_sd.BeagleDraft.from_pretrained(bundled_folder("smollm2-135m"))
assert all(parameter.isfinite().all() for parameter in draft.parameters())

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
target = transformers.LlamaForCausalLM(config).eval()
draft = beagle_sd.BeagleDraft.from_target(target)
prompt = torch.randint(97, (3, 5))
for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
    found = beagle_sd.generate(target, draft, prompt, max_new_tokens=20, eos_token_id=[], **settings)
    plain = beagle_sd.generate(target, None, prompt, max_new_tokens=20, eos_token_id=[], **settings)
    assert found.sequences.equal(plain.sequences)
print("the wheel works with torch", torch.__version__)
"""


def main(folder: str, torch_requirement: str) -> None:
    """Raises CalledProcessError where any step fails."""
    import torch

    (wheel,) = Path(folder).resolve().glob("*.whl")
    (sdist,) = Path(folder).resolve().glob("*.tar.gz")
    print(f"{wheel.name}: {wheel.stat().st_size >> 20} MiB; {sdist.name}: {sdist.stat().st_size >> 20} MiB")
    with tempfile.TemporaryDirectory() as clean:
        venv.create(clean, with_pip=True)
        python = Path(clean) / "bin" / "python"

        def run(*command: str) -> None:
            subprocess.run([str(python), *command], check=True, cwd=clean, stdin=subprocess.DEVNULL)

        run("-m", "pip", "install", "--quiet", torch_requirement, f"{wheel}[train,bench]")
        run("-m", "beagle_kernels")
        run("-m", "beagle_sd", "info")
        run("-c", SMOKE, str(Path(clean).resolve()), torch.__version__.split("+")[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
