"""Targets quantised on a CPU: torch's dynamic int8, torchao int8 weight-only, optimum-quanto int8, bitsandbytes 8
bit.

Expected: the tokens of that same target's plain generate, or refused with the reason.
"""

import sys
import warnings

import torch
from models import small_target

import beagle_sd

warnings.filterwarnings("ignore")


def tiny():
    return small_target(vocab_size=96, tie_word_embeddings=False)


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def dynamic_but_head(model):
    model.model = torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def ao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def ao_but_head(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def quanto(model):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    return model


def bnb(model):
    import bitsandbytes as b

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            new = b.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.weight = b.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[1], new)
    return model.to("cpu")


ids = torch.randint(1, 96, (1, 12))
failed = False
kinds = {f.__name__: f for f in (dynamic, dynamic_but_head, ao, ao_but_head, quanto, bnb)}
for name in sys.argv[1:] or kinds:
    try:
        model = kinds[name](tiny())
        want = model.generate(ids, max_new_tokens=20, do_sample=False)
    except Exception as error:
        print(name, "not usable here:", type(error).__name__, str(error)[:150])
        continue
    for what, make in (
        ("plain", lambda: None),
        ("draft", lambda: beagle_sd.BeagleDraft.from_target(model)),
        ("reduced draft", lambda: beagle_sd.BeagleDraft.from_target(model, torch.arange(0, 96, 2))),
    ):
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                made = beagle_sd.generate(model, make(), ids, max_new_tokens=20).sequences
            told = any("quanti" in str(w.message) for w in told)
            same = torch.equal(made, want)
            print(
                name,
                what,
                "same"
                if same
                else f"OTHER TOKENS from {(made[0, :32] != want[0, :32]).nonzero()[:1].flatten().tolist()}",
            )
            failed |= not same and not told
        except Exception as error:
            clear = isinstance(error, ValueError) and "allowed" in str(error)
            print(name, what, type(error).__name__, str(error)[:160].replace("\n", " "))
            failed |= not clear
sys.exit(failed)
