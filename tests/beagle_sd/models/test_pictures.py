"""Pictures in the prompt: the text is the model's own, whatever is drafted, and a round knows nothing of them."""

from __future__ import annotations

import pytest
import torch
from models import small_target
from picture_cases import IMAGE, KINDS, NEW, VIDEO, WITH_GRIDS, beside, picture_prompts, picture_target
from round_cases import PATHS, fixed_engine
from transformers import AutoConfig, AutoModelForImageTextToText

from beagle_sd import BeagleDraft, UnsupportedTarget, custom_generate, generate
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models import pictures
from beagle_sd.models.target import Target

ONE, RAGGED = [[(4, 6)]], [[(4, 4)], [], [(4, 6), (6, 4)]]
"""A row with a picture; rows with one, without, and with two of other sizes."""
TREE = TreeShape(depth=3, branch=8, num_nodes=60)


def own_text(target, prompt, **settings):
    return target.generate(**prompt, max_new_tokens=NEW, do_sample=False, **settings)


def written(target, draft, prompt, **settings):
    ids, mask, rest = beside(prompt)
    return generate(target, draft, ids, mask, model_inputs=rest, max_new_tokens=NEW, **settings)


def knowing(target, text, prompt) -> BeagleDraft:
    """A draft that knows no words but the text's, so that its trees are accepted often."""
    return BeagleDraft.from_target(target, text[:, prompt["input_ids"].shape[1] :].unique())


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def target(kind):
    return picture_target(kind)


@pytest.mark.parametrize("grids", [ONE, RAGGED], ids=["one", "ragged"])
def test_the_text_is_the_models_own(kind, target, grids):
    prompt = picture_prompts(kind, grids)
    want = own_text(target, prompt)
    draft = knowing(target, want, prompt)
    assert len(want[0, -NEW:].unique()) > 3
    assert torch.equal(written(target, None, prompt).sequences, want)
    made = written(target, draft, prompt, tree=TREE)
    assert torch.equal(made.sequences, want) and made.report.tokens_per_round > 1.1
    by = custom_generate(draft, tree=TREE)
    assert torch.equal(own_text(target, prompt, custom_generate=by), want)


def test_windows_with_pictures():
    target = picture_target("gemma3", layer_types=["sliding_attention", "full_attention"])
    prompt = picture_prompts("gemma3", RAGGED)
    want = own_text(target, prompt)
    assert torch.equal(written(target, knowing(target, want, prompt), prompt, tree=TREE).sequences, want)


def test_another_picture_gives_another_text(kind, target):
    prompt = picture_prompts(kind, ONE)
    other = prompt | {"pixel_values": prompt["pixel_values"].flip(-1)}
    assert not torch.equal(written(target, None, prompt).sequences, written(target, None, other).sequences)


def test_sampled_text_does_not_depend_on_the_draft(kind, target):
    prompt = picture_prompts(kind, RAGGED)
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    want = written(target, None, prompt, **settings).sequences
    assert torch.equal(written(target, knowing(target, want, prompt), prompt, tree=TREE, **settings).sequences, want)
    by = custom_generate(None, seed=5)
    made = target.generate(
        **prompt, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, custom_generate=by
    )
    assert torch.equal(made, want)


def test_padding_may_be_at_either_side(kind, target):
    left, right = (picture_prompts(kind, RAGGED, side) for side in ("left", "right"))
    made = written(target, None, right).sequences[:, -NEW:]
    assert torch.equal(made, written(target, None, left).sequences[:, -NEW:])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_film(kind):
    """Two pictures one after the other in time: their tokens count less than the text's on every axis."""
    target, prompt = picture_target(kind), picture_prompts(kind, [[(4, 8)]])
    ids = prompt["input_ids"]
    prompt["input_ids"] = ids.masked_fill(ids == IMAGE, VIDEO)
    prompt |= {
        "pixel_values_videos": prompt.pop("pixel_values"),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": 2 * prompt["mm_token_type_ids"],
    }
    del prompt["image_grid_thw"]
    want = own_text(target, prompt)
    draft = knowing(target, want, prompt)
    assert torch.equal(written(target, draft, prompt, tree=TREE).sequences, want)
    assert torch.equal(own_text(target, prompt, custom_generate=custom_generate(draft)), want)


def test_several_texts_of_a_prompt(kind, target):
    prompt = picture_prompts(kind, [[(4, 4)], [(4, 6)]])
    settings = {"max_new_tokens": NEW, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    want = target.generate(**prompt, **settings)
    assert torch.equal(target.generate(**prompt, **settings, custom_generate=custom_generate(None)), want)


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_goes_from_pictures_to_text_and_back(kind, target, path):
    """Where the positions go on is a buffer of the round's: the text between has nothing of the pictures before."""
    prompt = picture_prompts(kind, RAGGED)
    ids, mask, _ = beside(picture_prompts(kind, [[], [], []], seed=8))
    want, text = own_text(target, prompt), own_text(target, {"input_ids": ids, "attention_mask": mask})
    draft = knowing(target, want, prompt)
    engine = fixed_engine(target, draft, 3, prompt["input_ids"].shape[1] + NEW, **PATHS[path], tree=TREE)
    places = {name: tensor.data_ptr() for name, tensor in engine.buffers.tensors().items() if tensor.numel()}
    assert "offsets" in places
    for _ in range(2):
        assert torch.equal(written(target, draft, prompt, engine=engine).sequences, want)
        assert torch.equal(generate(target, draft, ids, mask, max_new_tokens=NEW, engine=engine).sequences, text)
    with pytest.raises(ValueError, match="1 prompts with pictures were given to an engine for 3 rows; allowed"):
        written(target, draft, picture_prompts(kind, [[(4, 4)]]), engine=engine)
    moved = [name for name, place in places.items() if engine.buffers.tensors()[name].data_ptr() != place]
    assert not moved


@pytest.mark.parametrize("kind", WITH_GRIDS)
def test_positions_off_by_one_give_another_text(kind, monkeypatch):
    target, prompt = picture_target(kind), picture_prompts(kind, RAGGED)
    want, right = own_text(target, prompt), pictures._next_positions
    monkeypatch.setattr(pictures, "_next_positions", lambda *given: right(*given) + 1)
    assert not torch.equal(written(target, None, prompt).sequences, want)


def test_positions_of_the_callers_own():
    """A text-only target, whose prompt begins at another position: as in transformers, the text goes on from there."""
    target = small_target()
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(1))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": 3 * torch.arange(9)[None]}
    want = own_text(target, prompt)
    assert torch.equal(written(target, None, prompt).sequences, want)


def test_the_model_is_as_before(kind, target):
    """Not even what its own forward notes of a prompt is left on it."""
    before = {name: dict(vars(module)) for name, module in target.named_modules()}
    written(target, None, picture_prompts(kind, ONE))
    for name, module in target.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items()), name


def test_its_own_generate_may_come_second(kind):
    """Hooks by which a forward records states are added to the view alone: twice, they would record others."""
    target, prompt = picture_target(kind), picture_prompts(kind, ONE)
    made = written(target, None, prompt)
    assert not any(module._forward_hooks for module in target.modules())
    assert torch.equal(made.sequences, own_text(target, prompt))


@pytest.mark.parametrize("name", ["pixel_valuez", "inputs_embeds", "input_ids", "labels", "output_attentions"])
def test_other_names_are_refused_with_those_allowed(name):
    target, prompt = picture_target("qwen2_vl"), picture_prompts("qwen2_vl", ONE)
    with pytest.raises(ValueError, match=rf"^{name} given beside.*allowed: .*pixel_values.*image_grid_thw"):
        generate(target, None, prompt["input_ids"], model_inputs={name: torch.zeros(1)}, max_new_tokens=2)


def test_a_picture_without_its_place_is_refused_by_the_models_own_words(kind, target):
    """Where the model refuses it: SmolVLM of older versions of transformers does not."""
    prompt = picture_prompts(kind, ONE)
    ids, mask, rest = beside(prompt)
    text = ids.masked_fill(ids == IMAGE, 5)
    try:
        want = own_text(target, {**prompt, "input_ids": text})
    except ValueError:
        pass
    else:
        assert kind == "smolvlm"
        made = generate(target, None, text, mask, model_inputs=rest, max_new_tokens=NEW)
        assert torch.equal(made.sequences, want)
        return
    with pytest.raises(ValueError, match=r"(?s)does not take the prompt with pixel_values.*\(\w+: .*\); allowed: "):
        generate(target, None, text, mask, model_inputs=rest, max_new_tokens=2)


def test_pixels_of_a_wrong_shape_are_a_value_error():
    ids, mask, rest = beside(picture_prompts("llava", ONE))
    rest["pixel_values"] = rest["pixel_values"][:, :, :30]
    with pytest.raises(ValueError, match="pixel_values"):
        generate(picture_target("llava"), None, ids, mask, model_inputs=rest, max_new_tokens=2)


def test_a_picture_token_may_lie_outside_the_vocabulary_but_no_other():
    target, prompt = picture_target("gemma3"), picture_prompts("gemma3", ONE)
    target.config.image_token_id = target.model.config.image_token_id = 128
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["input_ids"] == IMAGE, 128)
    assert torch.equal(written(target, None, prompt).sequences, own_text(target, prompt))
    prompt["input_ids"][0, 0] = 130
    with pytest.raises(ValueError, match="input_ids has 130; allowed: 0 to 127"):
        written(target, None, prompt)


@pytest.mark.parametrize("length", [5, 9])
def test_a_model_that_attends_to_its_pictures_apart_is_refused(length):
    """Though there be as many keys of the picture, 5, as tokens."""
    text = {"num_hidden_layers": 3, "cross_attention_layers": [1], "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "image_size": 32, "patch_size": 16, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mllama", text_config=text | heads, vision_config=vision, image_token_index=IMAGE)
    target = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():  # gates that are 0 keep pictures out
            parameter.add_(0.2 * torch.randn_like(parameter))
    pixels = {"pixel_values": torch.randn(1, 1, 1, 3, 32, 32), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64)}
    pixels |= {"aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.int64)}
    pixels |= {"cross_attention_mask": torch.ones(1, length, 1, 1, dtype=torch.int64)}
    with pytest.raises(UnsupportedTarget, match="Mllama.*(with pixel_values|does not hand its mask on).*allowed: "):
        generate(target, None, torch.arange(3, 3 + length)[None], model_inputs=pixels, max_new_tokens=2)


def test_what_stands_behind_a_rows_end_is_zero(kind, target):
    """Padding's states may be anything, and a value that is not finite would spoil the attention's sums."""
    ids, mask, rest = beside(picture_prompts(kind, RAGGED))
    wrapped = Target(target)
    cache = wrapped.new_cache(3, ids.shape[1] + 1)
    with torch.inference_mode():
        states = pictures.prefill_pictures(wrapped, pictures.PicturePrompt.of(wrapped, ids, mask, rest), cache)
    assert cache.lengths.tolist() == mask.sum(1).tolist()
    for row, length in enumerate(mask.sum(1).tolist()):
        assert not states[row, length:].any() and states[row, :length].any(-1).all()
        assert not any(states[:, :, row, :, length + 1 :].any() for states in cache.states)
    offsets = {"qwen2_vl": True, "qwen2_5_vl": True, "qwen3_vl": True}.get(kind, False)
    assert (cache.offsets != 0).tolist() == [offsets, False, offsets]
