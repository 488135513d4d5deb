"""Tests that run vLLM itself: in an environment that has it, and not with the others."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
