"""A round asks the host for nothing: tensors without data go through it, and PyTorch's own threads sleep."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import VOCAB, small_draft, small_target
from round_cases import PATHS, TREE, fixed_engine
from torch.utils._python_dispatch import TorchDispatchMode

from beagle_sd.decoding.rounds import play_round
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.cache import causal
from beagle_sd.models.target import Target


class Watched(TorchDispatchMode):
    """Collects the names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "count, by",
    [(16, "beagle.run_layers"), (300, "aten.scaled_dot_product_attention")],
)
def test_a_small_forward_on_the_cpu_leaves_pytorch_s_threads_asleep(count, by):
    """Woken, they spin for milliseconds on the cores that the linear layers want: index_put_ and SDPA wake them."""
    target = small_target()
    wrapped = Target(target)
    cache = wrapped.new_cache(2, 400)
    step = torch.arange(count).expand(2, -1)
    with torch.inference_mode(), Watched() as watched:
        wrapped.forward(step % 90, step, causal(2, count, step.device), cache)
    ops = {"aten.index_put_", "aten.scaled_dot_product_attention", "beagle.tree_attention", "beagle.run_layers"}
    assert ops & {name.removesuffix(".default") for name in watched.names} == {by}


READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.max()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x),
    "select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("read", READS)
def test_a_host_read_of_a_tensor_without_data_raises(read):
    """What the next test relies on: whatever would wait for a GPU cannot run on the meta device."""
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        READS[read](torch.ones(3, dtype=torch.int64, device="meta"))


@pytest.mark.skipif(transformers.__version__ < "5", reason="its rotary embedding asks for autocast, which meta has not")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("drafting", ["draft", "window", "plain"])
def test_a_round_reads_nothing_on_the_host(path, drafting, monkeypatch):
    """On tensors without data: no value and no shape can depend on any; nor does a list become a tensor on the way."""
    target = small_target("qwen3")
    draft = None
    if drafting != "plain":
        window = 90 if drafting == "window" else None
        draft = small_draft(target, draft_vocab=torch.arange(0, VOCAB, 2), window_keys=window)
    for model in (target, draft):
        if model is not None:
            model.to("meta")
    monkeypatch.setattr("beagle_sd.models.draft._check_draft_vocab", lambda *_: None)
    for tree in (TREE, TreeShape(6, 1, 7), TreeShape(6, 10, 60), TreeShape(2, 2, 1)):
        engine = fixed_engine(target, draft, 2, 40, return_logprobs=True, **PATHS[path], tree=tree)
        with torch.no_grad(), Watched() as watched:
            play_round(engine.target, draft, engine.buffers, engine.shape)
        assert "beagle.verify_tree.default" in watched.names
        assert "aten.lift_fresh.default" not in watched.names, "torch.tensor of Python values: a copy from the host"
