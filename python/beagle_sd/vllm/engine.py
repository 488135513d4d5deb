"""vLLM's engine as `beagle-sd prepare` uses it: in processes of its own, once for answers, once for states.

States come from vLLM's pooling runner, token by token: what it pools is what the model gives its LM head, after the
final norm, which is what our shards hold. vLLM's extraction of hidden states (its speculative method
"extract_hidden_states") gives the sum of the residual stream before that norm, and only through files. The price is a
second start and a second prefill of every text, little beside writing it. A text's rows come from one forward of the
whole text: chunked prefill and the prefix cache are off there, so that no row is cut away or given twice.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Settings:
    """target: a folder or hub name; dtype None: bf16 on a GPU, fp32 on a CPU; tensor_parallel: GPUs that share each
    matrix; longest: tokens of a text, at most."""

    target: str | Path
    dtype: torch.dtype | None
    tensor_parallel: int
    longest: int


class AnswerEngine:
    """Writes answers: `ask` begins one, `step` gives those that have come to their end."""

    def __init__(self, engine: Any, ends: list[int]):
        self.engine, self.ends = engine, ends

    def ask(self, name: str, ids: list[int], longest: int, temperature: float, seed: int) -> None:
        """Answer ids by at most `longest` tokens, the last of which may be one of `ends`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=longest,
            stop_token_ids=self.ends,
            ignore_eos=True,  # but for `ends`, which have it
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        _ask(self.engine, name, ids, how)

    def step(self) -> list[tuple[str, list[int]]]:
        """(name, tokens) of the answers that are finished; RuntimeError for one that vLLM gave up."""
        answers = []
        for output in self.engine.step():
            (answer,) = output.outputs
            if answer.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended the answer to prompt {output.request_id} by {answer.finish_reason!r}")
            answers.append((output.request_id, list(answer.token_ids)))
        return answers


class StateEngine:
    """Takes the top hidden states of texts: `ask` begins one, `step` gives those that are there."""

    def __init__(self, engine: Any):
        self.engine = engine

    def ask(self, name: str, ids: list[int]) -> None:
        from vllm import PoolingParams

        _ask(self.engine, name, ids, PoolingParams(task="token_embed", use_activation=False))

    def step(self) -> list[tuple[str, Tensor]]:
        """(name, states [n, d] in the model's dtype) of texts of n tokens."""
        return [(output.request_id, output.outputs.data) for output in self.engine.step()]


@contextmanager
def answering(settings: Settings, ends: list[int], batch: int) -> Iterator[AnswerEngine]:
    """An engine that writes up to `batch` answers at a time; its processes end with the block. ValueError where vLLM
    does not start with this target."""
    _set_environment()
    options: dict[str, Any] = {"runner": "generate", "max_num_seqs": batch, "enable_prefix_caching": True}
    with _started(settings, options) as engine:
        yield AnswerEngine(engine, ends)


@contextmanager
def giving_states(settings: Settings) -> Iterator[StateEngine]:
    """An engine that gives states; its processes end with the block. ValueError as above."""
    _set_environment()
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False)
    options: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": pooler,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "hf_overrides": {"head_dtype": "model"},  # else all is sent in fp32
    }
    with _started(settings, options) as engine:
        yield StateEngine(engine)


def _set_environment() -> None:
    """Before vLLM is first imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    # an engine's core in a process of its own goes on, with all the GPU's memory, where this one is killed; the workers
    # that this process starts itself do not
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextmanager
def _started(settings: Settings, options: dict[str, Any]) -> Iterator[Any]:
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    on_cpu = current_platform.is_cpu()
    dtype = settings.dtype or (torch.float32 if on_cpu else torch.bfloat16)
    arguments = EngineArgs(
        model=str(settings.target),
        dtype=_DTYPES[dtype],
        tensor_parallel_size=settings.tensor_parallel,
        distributed_executor_backend="mp",  # one worker has a process of its own, too
        max_model_len=settings.longest,
        enforce_eager=on_cpu,  # where compiling takes longer than it saves
        generation_config="vllm",  # else its sampling settings apply to all
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )
    try:
        with _interrupts_kept_here():
            engine = LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS)
    except Exception as error:
        if type(error) not in (Exception, RuntimeError):
            raise
        # of its workers, which have said the reason themselves
        raise ValueError(f"vLLM does not start with {settings.target} ({error}); the reason is above") from error
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()


@contextmanager
def _interrupts_kept_here() -> Iterator[None]:
    """Processes begun in the block never see Ctrl-C, which a terminal sends to all: else vLLM's would end before this
    one has stored what is finished. Here it still counts: by a thread begun before, which has it not blocked."""
    resource_tracker.ensure_running()  # which unblocks it where it starts, with the first process else
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


def _ask(engine: Any, name: str, ids: list[int], how: Any) -> None:
    engine.add_request(name, {"type": "token", "prompt_token_ids": ids}, how)
