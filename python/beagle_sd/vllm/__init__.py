"""A trained draft served by vLLM, whose plug-in this is: `register` is all that vLLM calls (docs/serve.md)."""

from __future__ import annotations

ARCHITECTURE = "BeagleDraft"
"""In the config.json of every saved draft. vLLM puts "Eagle" before it where the method is "eagle"."""
COUPLED = "beagle_sd.vllm.coupled:Coupled"
"""What `--logits-processors` takes for coupled sampling."""


def register() -> None:
    """Make the draft's config and model known to vLLM. Runs in each of its processes, any number of times, and
    touches no device. A vLLM that was not tried is told of where a draft is used, not to others."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from beagle_sd.vllm.config import ServedConfig

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    for name in (ARCHITECTURE, f"Eagle{ARCHITECTURE}"):
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "beagle_sd.vllm.model:ServedDraft")
