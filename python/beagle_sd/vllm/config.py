"""The draft's config as vLLM reads it: refused at once where it cannot be served."""

from __future__ import annotations

from typing import Any

from typing_extensions import Self

from beagle_sd.models.config import BeagleConfig
from beagle_sd.vllm.checks import check_draft_config, check_version


class ServedConfig(BeagleConfig):
    """A BeagleConfig of one layer, which vLLM asks for. ValueError for a draft, or a vLLM, that cannot serve."""

    def __init__(self, **kwargs: Any):
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**kwargs)
        self.num_hidden_layers = 1

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Self:
        check_version()
        made: Any = super().from_dict(config_dict, **kwargs)
        check_draft_config(made[0] if isinstance(made, tuple) else made)
        return made
