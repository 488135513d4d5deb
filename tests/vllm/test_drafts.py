"""Every drafted token of a served draft, of each kind of draft there is, is the one that our own loop drafts."""

from __future__ import annotations

import pytest
import torch
from vllm_engines import DEPTH, engine, save_tiny

import beagle_sd
from beagle_sd.decoding import rounds
from beagle_sd.vllm.serve import speculative_config

NEW_TOKENS = 48
PROMPT = [(7 * index * index + 3) % 250 for index in range(40)]
KINDS = {
    "plain": {},
    "window": {"window_keys": 8},
    "some of the vocabulary": {"draft_vocab": torch.arange(5, 250, 3)},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "window_keys": 16, "draft_vocab": torch.arange(3, 200)},
    "no norms, gelu": {"norm_query": False, "norm_state": False, "norm_output": False, "hidden_act": "gelu"},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32
        }
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """An engine starts in 4 seconds instead of 25."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def record(worker) -> None:
    """Runs in vLLM's worker: keep what the draft proposes."""
    model = worker.model_runner.drafter.model
    worker.drafted, plain = [], model.get_top_tokens

    def recording(states):
        tokens = plain(states)
        worker.drafted.append(tokens.tolist())
        return tokens

    model.get_top_tokens = recording


def recorded(worker) -> list:
    return worker.drafted


def served(target, draft, **settings) -> tuple[list[int], list[list[int]]]:
    """The new tokens of PROMPT, and each round's drafted ones, which all ranks agree on."""
    from vllm import SamplingParams

    parallel = {"tensor_parallel_size": settings.get("tensor_parallel_size", 1)}
    settings |= {"max_model_len": 512, "skip_tokenizer_init": True}
    settings["distributed_executor_backend"] = "mp" if settings.get("tensor_parallel_size") else "uni"
    with engine(target, speculative_config(target, draft, DEPTH, **parallel), **settings) as llm:
        llm.collective_rpc(record)
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        first, *others = llm.collective_rpc(recorded)
    assert all(other == first for other in others)
    steps = [token for (token,) in first]
    return list(output.outputs[0].token_ids), [steps[at : at + DEPTH] for at in range(0, len(steps), DEPTH)]


def own(target_folder, draft_folder, monkeypatch) -> tuple[list[int], list[list[int]]]:
    from transformers import LlamaForCausalLM

    target = LlamaForCausalLM.from_pretrained(target_folder).eval()
    draft = beagle_sd.BeagleDraft.from_pretrained(draft_folder).eval()
    drafted = []

    def recording(*args):
        candidates = plain(*args)
        drafted.append(candidates.tokens[0].tolist())
        return candidates

    plain = rounds.propose
    monkeypatch.setattr(rounds, "propose", recording)
    out = beagle_sd.generate(
        target,
        draft,
        torch.tensor([PROMPT]),
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[],
        tree=beagle_sd.TreeShape(DEPTH, 1, DEPTH + 1),
    )
    return out.sequences[0, len(PROMPT) :].tolist(), drafted


@pytest.mark.parametrize("kind", KINDS)
def test_every_drafted_token_is_our_own_loops(tmp_path, monkeypatch, kind):
    target, draft = save_tiny(tmp_path, **KINDS[kind])
    tokens, drafted = own(target, draft, monkeypatch)
    served_tokens, served_drafts = served(target, draft)
    assert served_tokens == tokens
    assert served_drafts[: len(drafted)] == drafted and len(drafted) > NEW_TOKENS // (DEPTH + 1)
    assert len({token for round_ in drafted for token in round_}) > 10


@pytest.mark.parametrize("kind", ["plain", "one key head"])
def test_over_two_devices_every_drafted_token_is_that_of_one(tmp_path, kind):
    target, draft = save_tiny(tmp_path, **KINDS[kind])
    assert served(target, draft, tensor_parallel_size=2) == served(target, draft)
