"""onnxruntime-genai's loop on a graph of its own model builder.

Its threads spin between the operators of an answer, which is faster than to let them sleep, and for some 30 ms after
it. The cache has the graph's dtype, fp32, and the length of the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

PACKAGES = ("onnxruntime-genai", "onnxruntime")


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: model (a folder with genai_config.json, which names the tokens that end an answer), threads."""
    import numpy as np
    import onnxruntime_genai

    session = {"intra_op_num_threads": options["threads"], "inter_op_num_threads": 1}
    config = onnxruntime_genai.Config(options["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = onnxruntime_genai.Model(config)

    def answer(prompt: list[int], new_tokens: int) -> tuple[list[int], float | None]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False, batch_size=1)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        tokens, first = [], 0.0
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter()
        return tokens, time.perf_counter() - first

    return answer
