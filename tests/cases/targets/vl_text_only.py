"""Vision-language targets asked about text alone (and with an image that has no place in it).

Expected: text works or is refused with the reason; such an image is an error, never ignored.
"""

import sys
import warnings

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, logging

import beagle_sd

warnings.filterwarnings("ignore")
logging.set_verbosity_error()

T = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def qwen25():
    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=dict(T, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[0]
        ),
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def qwen3():
    return AutoConfig.for_model(
        "qwen3_vl",
        text_config=dict(
            T, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        ),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, deepstack_visual_indexes=[0]
        ),
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def llava():
    return AutoConfig.for_model(
        "llava",
        text_config=dict(T, model_type="llama"),
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=32,
        ),
        image_token_index=120,
    )


def smolvlm():
    return AutoConfig.for_model(
        "smolvlm",
        text_config=dict(T, model_type="llama"),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        image_token_id=120,
        pad_token_id=0,
    )


failed = False
for f in (qwen25, qwen3, llava, smolvlm):
    try:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(f()).eval()
        ids = torch.randint(3, 90, (1, 9))
        want = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    except Exception as error:
        print(f.__name__, "not made:", type(error).__name__, str(error)[:120])
        continue
    for name, call in (
        ("plain", lambda: beagle_sd.generate(model, None, ids, max_new_tokens=16).sequences),
        (
            "draft",
            lambda: (
                beagle_sd.generate(model, beagle_sd.BeagleDraft.from_target(model), ids, max_new_tokens=16).sequences
            ),
        ),
        (
            "custom_generate",
            lambda: model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
                custom_generate=beagle_sd.custom_generate(beagle_sd.BeagleDraft.from_target(model)),
            ),
        ),
    ):
        try:
            same = torch.equal(call(), want)
            failed |= not same
            print(f.__name__, name, "same" if same else "OTHER")
        except ValueError as error:
            print(f.__name__, name, "refused:" if "allowed" in str(error) else "ValueError", str(error)[:160])
            failed |= "allowed" not in str(error) or name == "custom_generate"
        except Exception as error:
            print(f.__name__, name, type(error).__name__, str(error)[:160])
            failed = True
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(1, 3, 32, 32),
            max_new_tokens=4,
            do_sample=False,
            custom_generate=beagle_sd.custom_generate(None),
        )
        print(f.__name__, "image silently ignored")
        failed = True
    except Exception as error:
        print(f.__name__, "image:", type(error).__name__, str(error)[:120])
sys.exit(failed)
