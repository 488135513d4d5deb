"""llama.cpp compiled for this processor, by llama-cpp-python's loop over token ids.

With fp32 weights the KV cache is fp32 too, else f16 as by default. No prompt is kept from request to request. OpenMP's
threads spin for some milliseconds after an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PACKAGES = ("llama-cpp-python",)


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: model (a GGUF), cache ("F32" or "F16"), lookup (None or the fields of LlamaPromptLookupDecoding), ends
    (token ids that end an answer), capacity (the most prompt and new tokens), threads."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    cache = getattr(llama_cpp, f"GGML_TYPE_{options['cache']}")
    threads = options["threads"]
    model = llama_cpp.Llama(
        options["model"],
        n_ctx=-(-options["capacity"] // 256) * 256,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=cache,
        type_v=cache,
        draft_model=LlamaPromptLookupDecoding(**options["lookup"]) if options["lookup"] else None,
        verbose=False,
    )

    def answer(prompt: list[int], new_tokens: int) -> tuple[list[int], float | None]:
        tokens: list[int] = []
        first = 0.0
        for token in model.generate(prompt, temp=0.0):
            first = first or time.perf_counter()
            tokens.append(token)
            if token in options["ends"] or len(tokens) == new_tokens:
                break
        decode = time.perf_counter() - first
        model.reset()
        return tokens, decode

    return answer
