"""llama.cpp's server inside this process, from the wheel xllamacpp, asked over HTTP for token ids.

The wheel is built for processors with AVX2: one with AVX-512 has more than it uses (`llamacpp_native.py`). With fp32
weights the KV cache is fp32 too, else f16 as by default, and attention is not the flash kernel, whose rounding parts
texts. Prompts are not kept from request to request, and the greedy token is the sampler's only step. OpenMP's threads
spin for some milliseconds after an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

PACKAGES = ("xllamacpp",)


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: model (a GGUF, whose end token ends an answer), cache ("F32" or "F16"), lookup (None or the speculation
    and its fields), capacity (the most prompt and new tokens), threads."""
    import xllamacpp

    server = xllamacpp.Server(_params(xllamacpp, options))
    address = server.listening_address.removeprefix("http://")
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False, "return_tokens": True}

    def answer(prompt: list[int], new_tokens: int, keep=server) -> tuple[list[int], float | None]:
        connection = HTTPConnection(address, timeout=600)
        body = json.dumps({"prompt": prompt, "n_predict": new_tokens} | greedy)
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        out = json.load(connection.getresponse())
        connection.close()
        return out["tokens"], out["timings"]["predicted_ms"] / 1e3

    return answer


def _params(xllamacpp: Any, options: dict) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx, params.n_parallel = -(-options["capacity"] // 256) * 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options['cache']}")
    if options["cache"] == "F32":
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib, params.fit_params, params.verbosity = 0, False, 0
    if options["lookup"]:
        kind = options["lookup"]["type"]
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
        for name, value in options["lookup"]["fields"].items():
            setattr(getattr(params.speculative, kind.lower()), name, value)
    return params
