"""The model as decoding runs it: the user's own one, seen by other threads meanwhile, never changes."""

from __future__ import annotations

import threading

import peft
import pytest
import torch
from accelerate import dispatch_model
from decoding_cases import greedy, prompts
from models import small_draft, small_target
from torch import nn

from beagle_sd import UnsupportedTarget, custom_generate, generate
from beagle_sd.models.view import view_of


def test_the_weights_are_the_models_own():
    target = small_target()
    view = view_of(target)
    theirs = dict(target.named_parameters(remove_duplicate=False))
    assert {name: id(one) for name, one in view.named_parameters(remove_duplicate=False)} == {
        name: id(one) for name, one in theirs.items()
    }
    assert not {id(module) for module in view.modules()} & {id(module) for module in target.modules()}
    assert view.model.layers[0].self_attn.config is view.config is not target.config
    target.to(torch.bfloat16)
    assert view.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_plain_calls_of_other_threads_are_as_alone():
    target, ids = small_target(), prompts(1)
    draft = small_draft(target)
    with torch.no_grad():
        alone = target(ids).logits
    want = greedy(target, ids, max_new_tokens=4)
    faults, done, calls = [], threading.Event(), 0

    def speculate():
        for _ in range(3):
            generate(target, draft, ids, max_new_tokens=40)
        done.set()

    worker = threading.Thread(target=speculate)
    worker.start()
    while not done.is_set() or calls < 20:
        calls += 1
        try:
            with torch.no_grad():
                torch.testing.assert_close(target(ids).logits, alone, rtol=1e-4, atol=1e-4)
            assert torch.equal(greedy(target, ids, max_new_tokens=4), want)
        except Exception as error:
            faults.append(error)
    worker.join()
    assert not faults


def test_a_criterion_may_use_the_model_and_gradients():
    """A guard that asks the target itself, or trains a probe, as with plain generate."""
    target, ids = small_target(), prompts(1)
    alone, asked = target(ids).logits.detach(), []

    def guard(so_far, scores, **kwargs):
        logits = target(so_far[:, :11]).logits
        logits.sum().backward()
        asked.append(torch.allclose(logits, alone, atol=1e-4))
        return False

    made = generate(target, small_draft(target), ids, max_new_tokens=6, stopping_criteria=[guard])
    assert asked == [True] * 6 and made.sequences.shape[1] == 17


def compiled(target):
    return torch.compile(target, backend="eager")


def compiled_in_place(target):
    target.compile(backend="eager")
    return target


def compiled_forward(target):
    target.forward = torch.compile(target.forward, backend="eager")
    return target


def offloaded_layer(target):
    return dispatch_model(
        target,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
        main_device="cpu",
        offload_dir=offloaded_layer.folder,
    )


def adapted(target):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(target, config).eval()


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_forward, offloaded_layer, adapted])
def test_wrapped_targets_give_their_own_text(wrap, tmp_path):
    offloaded_layer.folder = tmp_path
    target, ids = wrap(small_target(tie_word_embeddings=False)), prompts(1)
    want = target.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    draft = small_draft(target)
    assert torch.equal(generate(target, draft, ids, max_new_tokens=12).sequences, want)
    made = target.generate(input_ids=ids, max_new_tokens=12, do_sample=False, custom_generate=custom_generate(draft))
    assert torch.equal(made, want)


def test_what_is_no_model_is_named():
    with pytest.raises(UnsupportedTarget, match="the target is a Linear; allowed: a transformers model"):
        generate(nn.Linear(2, 2), None, prompts(1))
    prompted = peft.get_peft_model(small_target(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedTarget, match="PROMPT_TUNING, whose learned prompt .*; allowed: adapters in the la"):
        generate(prompted.eval(), None, prompts(1))


def test_autocast_and_the_default_dtype_change_no_token():
    target, ids = small_target(), prompts(2)
    draft = small_draft(target)
    want = greedy(target, ids, max_new_tokens=12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(target, draft, ids, max_new_tokens=12).sequences, want)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            made = generate(target, draft, ids, max_new_tokens=12, return_logprobs=True)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(made.sequences, want) and made.logprobs.dtype == torch.float32
