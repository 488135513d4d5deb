"""vLLM engines over SmolLM2 and tiny targets, and what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import beagle_sd
from beagle_sd.models import smollm2
from beagle_sd.models.loading import bundled_folder
from beagle_sd.vllm.serve import speculative_config
from bench.answers.real_prompts import batches, encoded_prompts
from bench.answers.vllm import until_end

PROMPTS, ROWS, NEW_TOKENS, DEPTH = 12, 4, 128, 4


@dataclass
class Answers:
    """The new tokens of each prompt; rounds, and how many accepted 1, 2, ... drafted tokens."""

    tokens: list[list[int]]
    rounds: int = 0
    accepted: tuple[int, ...] = ()


def prompts() -> list[list[int]]:
    """The first turns of MT-Bench, through SmolLM2's chat template."""
    _, tokenizer = smollm()[:2]
    return encoded_prompts("mt-bench", tokenizer, PROMPTS)


_smollm: list = []


def smollm():
    """(target, tokenizer, draft) in fp32, loaded once."""
    if not _smollm:
        _smollm.append(beagle_sd.load_bundled(dtype=torch.float32, device="cpu"))
    return _smollm[0]


def own_answers(texts: list[list[int]], new_tokens: int = NEW_TOKENS, **sampling) -> Answers:
    """By beagle_sd.generate, with a chain as vLLM drafts it; ROWS greedy texts at a time, sampled ones one by one."""
    target, _, draft = smollm()
    pad = target.generation_config.pad_token_id
    made = Answers([])
    reached = [0] * (DEPTH + 1)
    seed = sampling.pop("seed", 0)
    for index, (ids, mask) in enumerate(batches(texts, 1 if sampling else ROWS, pad)):
        chain = beagle_sd.TreeShape(DEPTH, 1, DEPTH + 1)
        out = beagle_sd.generate(
            target, draft, ids, mask, max_new_tokens=new_tokens, tree=chain, seed=seed + index, **sampling
        )
        made.tokens += [until_end(row, 2) for row in out.sequences[:, ids.shape[1] :].tolist()]
        made.rounds += out.report.row_rounds
        reached = [a + b for a, b in zip(reached, out.report.reached)]
    made.accepted = tuple(reached[1:])
    return made


_APART = """
import json, sys
from dataclasses import asdict
from vllm_engines import own_answers
texts, new_tokens, settings = json.load(sys.stdin)
json.dump([asdict(own_answers([text], new_tokens, **one)) for text, one in zip(texts, settings)], sys.stdout)
"""


def own_answers_apart(texts: list[list[int]], new_tokens: int, settings: list[dict]) -> list[Answers]:
    """Each text by itself with settings of its own, in a process without INTERPRETED: under the interpreter our own
    Triton kernels would serve CPU tensors."""
    environment = {name: value for name, value in os.environ.items() if name not in INTERPRETED}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    given = json.dumps([texts, new_tokens, settings])
    done = subprocess.run([sys.executable, "-c", _APART], input=given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Answers(**one) for one in json.loads(done.stdout)]


def bundled_settings(count: int = DEPTH) -> dict:
    """speculative_config of the bundled draft, the folder as it is on disk."""
    return speculative_config(smollm2.NAME, bundled_folder(smollm2.NAME), count)


@contextmanager
def engine(model: str | Path, speculative: dict | None = None, **settings):
    """A vllm.LLM whose processes are gone afterwards."""
    from vllm import LLM

    defaults = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": ROWS, "enforce_eager": True}
    defaults |= {"enable_prefix_caching": False, "disable_log_stats": False, "speculative_config": speculative}
    llm = LLM(str(model), **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def served_answers(
    llm, texts: list[list[int]], new_tokens: int | list[int] = NEW_TOKENS, extra: list[dict] | None = None
) -> Answers:
    """By an engine, ROWS at a time, greedy in vLLM's eyes; the counts of this call alone."""
    from vllm import SamplingParams

    before = _counts(llm)
    made = Answers([])
    for start in range(0, len(texts), ROWS):
        part = texts[start : start + ROWS]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=new_tokens if isinstance(new_tokens, int) else new_tokens[start + row],
                extra_args=extra[start + row] if extra else None,
            )
            for row in range(len(part))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in part], params, use_tqdm=False)
        made.tokens += [list(output.outputs[0].token_ids) for output in outputs]
    after = _counts(llm)
    made.rounds = after[0] - before[0]
    made.accepted = tuple(a - b for a, b in zip(after[1], before[1]))
    return made


def _counts(llm) -> tuple[int, list[int]]:
    found = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found.get("vllm:spec_decode_num_drafts")
    if drafts is None:
        return 0, []
    return drafts.value, list(found["vllm:spec_decode_num_accepted_tokens_per_pos"].values)


def save_tiny(folder: Path, layers: int = 2, **draft) -> tuple[Path, Path]:
    """(target, draft): a random Llama of 4 query and 2 key heads with vocabulary 256, and a random draft of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512, eos_token_id=255, bos_token_id=0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    target = LlamaForCausalLM(config).eval()
    ids = draft.pop("draft_vocab", None)
    made = beagle_sd.BeagleDraft.from_target(target, draft_vocab=ids, initializer_range=0.2, **draft)
    target.save_pretrained(folder / "target")
    made.save_pretrained(folder / "draft")
    return folder / "target", folder / "draft"


INTERPRETED = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": str(Path(__file__).parent / "interpreter"),
}
"""With which vLLM's second runner, a GPU's, runs on the CPU in Triton's interpreter: the folder has a distribution that
says there is a backend `cpu`, by which name vLLM asks; nothing of it is used."""
