"""Install the wheel in a clean environment and use it: try_wheel.py dist TORCH TRANSFORMERS

First with torch alone, which is what the kernels need; then with the extras, another torch than the one it was built
beside (the extension links none) and the lowest transformers allowed. A draft saved there loads here, and one saved
here loads there.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

KERNELS = """
import importlib.util, sys, torch
import beagle_kernels as bk

folder = sys.argv[1]
assert bk.__file__.startswith(folder), bk.__file__
assert not torch.__version__.startswith(sys.argv[2]), f"torch {torch.__version__} is what the wheel was built beside"
assert importlib.util.find_spec("transformers") is None
cpu = torch.device("cpu")
for op in ("choose_tokens", "perturb_logits", "top_candidates", "lookup", "join_branch", "build_tree", "accept_tree",
           "verify_tree", "verify_chain", "compact_cache_", "tree_attention"):
    assert (reason := bk.backends.why_not(op, "cpu", cpu, torch.float32)) is None, (op, reason)
try:
    import beagle_sd
except ImportError as error:
    assert 'pip install "beagle-kernels[sd]"' in str(error), error
else:
    raise AssertionError("beagle_sd was imported without transformers")
"""

DRAFT = """
import sys, torch, transformers
import beagle_sd

def target():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()

def described(draft):
    states = draft.keys_values(torch.ones(1, 9, 64), torch.arange(9)[None])
    return [round(float(part.double().abs().sum()), 4) for part in states]

action, folder = sys.argv[1:3]
if action == "save":
    draft = beagle_sd.BeagleDraft.from_target(target())
    draft.save_pretrained(folder)
else:
    draft = beagle_sd.BeagleDraft.from_pretrained(folder).eval().bind(target())
print(described(draft))
"""

SMOKE = (
    """
import sys
sys.argv[1:] = ["save", sys.argv[1]]
"""
    + DRAFT
    + """
from beagle_sd.models.loading import bundled_folder

bundled = beagle_sd.BeagleDraft.from_pretrained(bundled_folder("smollm2-135m"))
assert all(parameter.isfinite().all() for parameter in bundled.parameters())
prompt = torch.randint(97, (3, 5))
model = target()
for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
    found = beagle_sd.generate(model, draft, prompt, max_new_tokens=20, eos_token_id=[], **settings)
    plain = beagle_sd.generate(model, None, prompt, max_new_tokens=20, eos_token_id=[], **settings)
    assert found.sequences.equal(plain.sequences)
"""
)


def last_line(python: str | Path, *command: str, folder: str) -> str:
    """What it printed last; its errors are shown as they come."""
    done = subprocess.run(
        [str(python), *command], check=True, cwd=folder, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout, end="", flush=True)
    return done.stdout.strip().rsplit("\n", 1)[-1]


def main(folder: str, torch_requirement: str, transformers_requirement: str) -> None:
    """Raises CalledProcessError or AssertionError where any step fails."""
    (wheel,) = Path(folder).resolve().glob("*.whl")
    (sdist,) = Path(folder).resolve().glob("*.tar.gz")
    print(f"{wheel.name}: {wheel.stat().st_size >> 20} MiB; {sdist.name}: {sdist.stat().st_size >> 20} MiB")
    built_beside = importlib.metadata.version("torch").split("+")[0]
    with tempfile.TemporaryDirectory() as clean:
        venv.create(clean, with_pip=True)
        python = Path(clean) / "bin" / "python"

        def run(*command: str) -> str:
            return last_line(python, *command, folder=clean)

        run("-m", "pip", "install", "--quiet", torch_requirement, str(wheel))
        run("-c", KERNELS, str(Path(clean).resolve()), built_beside)
        run("-m", "beagle_kernels")
        run("-m", "beagle_kernels.lossless", "--texts", "500")
        refused = subprocess.run([Path(clean) / "bin" / "beagle-sd"], capture_output=True, text=True, cwd=clean)
        assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr
        run("-m", "pip", "install", "--quiet", torch_requirement, transformers_requirement, f"{wheel}[train,bench]")
        run("-m", "beagle_sd", "info")
        there = run("-c", SMOKE, f"{clean}/there")
        assert last_line(sys.executable, "-c", DRAFT, "load", f"{clean}/there", folder=clean) == there
        here = last_line(sys.executable, "-c", DRAFT, "save", f"{clean}/here", folder=clean)
        assert run("-c", DRAFT, "load", f"{clean}/here") == here
    print(f"the wheel works with {torch_requirement} and {transformers_requirement}; drafts load both ways")


if __name__ == "__main__":
    main(*sys.argv[1:])
