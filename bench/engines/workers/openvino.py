"""OpenVINO GenAI's pipeline on a graph that optimum-intel exported.

fp32 is asked for twice, as precision of the products and of the KV cache, whose defaults on a CPU are bf16 (where the
processor has it) and u8; int8 weights have these defaults, as their users do. One stream for latency, a prompt in one
piece, and no prefix kept from prompt to prompt. Its threads sleep as soon as an answer is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = ("openvino-genai", "openvino")


def load(options: dict) -> Callable[[list[int], int], tuple[list[int], float | None]]:
    """options: model (a folder with openvino_model.xml), properties (of the plugin), lookup (None or the fields of
    the generation config that set prompt lookup), ends (token ids that end an answer), capacity (the most prompt and
    new tokens), threads."""
    import numpy as np
    import openvino
    import openvino_genai

    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": options["threads"],
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, options["capacity"]
    properties["scheduler_config"] = scheduler
    properties |= options["properties"] | ({"prompt_lookup": True} if options["lookup"] else {})
    pipeline = openvino_genai.LLMPipeline(options["model"], "CPU", **properties)
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.apply_chat_template = False, False
    config.eos_token_id, config.stop_token_ids = options["ends"][0], set(options["ends"])
    for name, value in (options["lookup"] or {}).items():
        setattr(config, name, value)

    def answer(prompt: list[int], new_tokens: int) -> tuple[list[int], float | None]:
        config.max_new_tokens = new_tokens
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        out = pipeline.generate(inputs, config)
        tokens = [int(token) for token in out.tokens[0]]
        if len(tokens) < new_tokens and tokens[-1:] != options["ends"][:1]:
            tokens.append(options["ends"][0])  # it was chosen too, but is not handed out
        return tokens, (len(tokens) - 1) * out.perf_metrics.get_tpot().mean / 1e3

    return answer
