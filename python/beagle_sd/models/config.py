"""What a saved draft has beside its weights: its config, and the code by which transformers decodes with it given its
name alone."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from beagle_sd.files import name_in_the_end


class BeagleConfig(PretrainedConfig):
    """Shape of the block, all of it taken from the target by `BeagleDraft.from_target`.

    rope_parameters: as transformers 5 has them; draft_vocab_size: tokens the draft can propose (None: all of the
    target's); norm_query, norm_state, norm_output: RMSNorms that can be switched off; append_states: whether a node
    sees its ancestors' draft states (the paper's "-concate" is False); window_keys: the query at position i sees only
    keys at positions j >= i - window_keys, of true and of draft states (None: all of them).

    ValueError for numbers of heads or keys out of range.
    """

    model_type = "beagle"

    def __init__(
        self,
        hidden_size: int = 576,
        intermediate_size: int = 1536,
        num_attention_heads: int = 9,
        num_key_value_heads: int = 3,
        head_dim: int = 64,
        vocab_size: int = 49152,
        draft_vocab_size: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 8192,
        rope_parameters: dict | None = None,
        norm_query: bool = True,
        norm_state: bool = True,
        norm_output: bool = True,
        append_states: bool = True,
        window_keys: int | None = None,
        target_type: str = "llama",
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.norm_query = norm_query
        self.norm_state = norm_state
        self.norm_output = norm_output
        self.append_states = append_states
        self.window_keys = window_keys
        self.target_type = target_type
        self.initializer_range = initializer_range
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {num_key_value_heads}; allowed: divisors of the "
                f"{num_attention_heads} query heads"
            )
        if window_keys is not None and window_keys < 1:
            raise ValueError(f"window_keys is {window_keys}; allowed: 1 or more, or None, which shows all keys")
        super().__init__(**kwargs)

    @classmethod
    def of_target(cls, config: PretrainedConfig, **overrides) -> BeagleConfig:
        """The config of a draft for a target with this config; overrides go on top."""

        def known(name: str, default: Any = None) -> Any:
            try:  # Gemma 4 raises for what differs from layer to layer
                return getattr(config, name, None) or default
            except (AttributeError, RuntimeError):
                return default

        heads = known("num_attention_heads") or max(1, config.hidden_size // 64)
        inner = known("intermediate_size", 4 * config.hidden_size)
        fields = {
            "hidden_size": config.hidden_size,
            "intermediate_size": max(inner) if isinstance(inner, list | tuple) else inner,  # one a layer
            "num_attention_heads": heads,
            "num_key_value_heads": known("num_key_value_heads", heads),
            "head_dim": known("head_dim", config.hidden_size // heads),
            "vocab_size": config.vocab_size,
            "hidden_act": getattr(config, "hidden_act", "silu"),
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
            "max_position_embeddings": getattr(config, "max_position_embeddings", 8192),
            "target_type": config.model_type,
            "tie_word_embeddings": False,
        }
        fields["rope_parameters"] = _rope_of(config)
        return cls(**{**fields, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> BeagleConfig:
        """As in transformers; ValueError for the config of another kind of model, or one written by transformers 4."""
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"the config is of a {kind} model; allowed: {cls.model_type}, a draft's")
        if not config_dict.get("rope_parameters"):
            raise ValueError(
                "the config has no rope_parameters, as transformers 4 wrote it; allowed: by transformers 5"
            )
        return super().from_dict(config_dict, **kwargs)


_FIXED_ROPE = ("default", "linear", "yarn", "llama3")


def _rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The target's rotary parameters as the draft, which turns whole heads by fixed angles, takes them; those of the
    layers with full attention where they differ, and plain ones where the target has none."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:  # none, or a model of its own code, in transformers 4's names
        rope = {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", None) or 10000.0}
        rope |= getattr(config, "rope_scaling", None) or {}
    if nested := [one for one in rope.values() if isinstance(one, dict)]:
        rope = rope.get("full_attention") or nested[0]
    if rope.get("rope_type") not in _FIXED_ROPE:
        return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}
    return {name: rope[name] for name in rope if name != "partial_rotary_factor"}


_MODULE = Path("custom_generate", "generate.py")
_SOURCE = '''"""target.generate(..., custom_generate=NAME, trust_remote_code=True): decodes with the draft NAME.

transformers runs a copy of this file, which finds the draft by what stands here, or by the name it has on a hub.
"""

try:
    from beagle_sd import generate_saved
except ImportError as error:
    raise ImportError('this draft needs the package beagle_sd: pip install "beagle-kernels[sd]"') from error

FOLDER = {folder!r}
SAVED = {saved!r}


def generate(model, **arguments):
    return generate_saved(model, __name__, FOLDER, SAVED, **arguments)
'''


def write_custom_generate(folder: str | Path) -> None:
    """Write `custom_generate` into the folder of a draft that was just saved."""
    folder = Path(folder)
    path = folder / _MODULE
    path.parent.mkdir(exist_ok=True)
    named = name_in_the_end(folder.absolute())
    path.write_text(_SOURCE.format(folder=str(named), saved=uuid.uuid4().hex), encoding="utf-8")


def saved_draft(module: str, folder: str, saved: str) -> tuple[str, str | None]:
    """The draft that a copy of the file, imported as `module`, belongs to: its folder or its name on a hub, and there
    its revision.

    ValueError where the folder it was saved as is gone, or holds another draft by now.
    """
    names = [_unmangled(part) for part in module.split(".")[1:-2]]
    if len(names) == 3:  # transformers_modules.USER.NAME.COMMIT.custom_generate.generate
        return f"{names[0]}/{names[1]}", names[2]
    for place in (Path(folder), Path(names[0])):
        if (place / _MODULE).is_file() and saved in (place / _MODULE).read_text(encoding="utf-8"):
            return str(place), None
    raise ValueError(
        f"this draft was saved as {folder}, which is gone or holds another by now; "
        "allowed: its folder in the call of generate, as draft='FOLDER'"
    )


def _unmangled(name: str) -> str:
    """A part of a name as it was before transformers made a Python name of it."""
    plain = name.replace("_hyphen_", "-").replace("_dot_", ".")
    return plain[1:] if plain[:1] == "_" and plain[1:2].isdigit() else plain
