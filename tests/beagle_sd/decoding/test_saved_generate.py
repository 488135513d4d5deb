"""A saved draft by its name: target.generate(..., custom_generate=NAME, trust_remote_code=True)."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from decoding_cases import NEW, Recorder, prompts
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer

from beagle_sd import BeagleDraft, generate_saved
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import whole


@pytest.fixture(scope="module")
def target():
    return agreeable_target()


@pytest.fixture
def draft(target, tmp_path, monkeypatch):
    """A draft saved as a trainer does, and a place for transformers' copies."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with whole(tmp_path / "my-draft.v1") as partial:
        small_draft(target).save_pretrained(partial)
    return tmp_path / "my-draft.v1"


def speculated(target, name, **more):
    settings = {"do_sample": False, "max_new_tokens": NEW, "trust_remote_code": True, **more}
    return target.generate(prompts(1), custom_generate=str(name), **settings)


@pytest.fixture
def loads(monkeypatch):
    """What is loaded, by name and revision."""
    names, load = [], BeagleDraft.from_pretrained

    def noted(name, **more):
        names.append((str(name), more.get("revision")))
        return load(name)

    monkeypatch.setattr(BeagleDraft, "from_pretrained", noted)
    return names


def test_everything_given_to_generate_arrives(target, draft, loads):
    want = target.generate(prompts(1), do_sample=False, max_new_tokens=NEW)
    recorder = Recorder()
    made = speculated(target, draft, streamer=recorder, return_dict_in_generate=True, tree=TreeShape(3, 2, 6))
    assert torch.equal(made.sequences, want) and made.report.tokens_per_round > 1.1
    assert sum(recorder.runs, []) == want[0].tolist() and recorder.ended == 1
    tokenizer = small_tokenizer()
    stops = {"stop_strings": [tokenizer.decode(want[0, 20:22])], "tokenizer": tokenizer}
    stopped = target.generate(prompts(1), do_sample=False, max_new_tokens=NEW, **stops)
    assert torch.equal(speculated(target, draft, **stops), stopped) and stopped.shape[1] <= 22
    assert loads == [(str(draft), None)], "loaded once"
    sampled = [speculated(target, draft, do_sample=True, seed=5) for _ in range(2)]
    assert torch.equal(*sampled)


def test_a_draft_saved_anew_is_loaded_anew(target, draft, loads):
    speculated(target, draft)
    small_draft(target, seed=2).save_pretrained(draft)
    os.utime(draft / "model.safetensors", ns=(1, 2**62))
    speculated(target, draft)
    assert len(loads) == 2


def test_a_moved_draft_is_found_or_asked_for(target, draft, monkeypatch):
    want = target.generate(prompts(1), do_sample=False, max_new_tokens=NEW)
    monkeypatch.chdir(draft.parent)
    draft.rename("moved")
    assert torch.equal(speculated(target, "moved"), want)
    (draft.parent / "deep").mkdir()
    shutil.move("moved", "deep/moved")
    recorder = Recorder()
    with pytest.raises(
        ValueError, match="my-draft.v1, which is gone or holds another by now; allowed: .*draft='FOLDER'"
    ):
        speculated(target, "deep/moved", streamer=recorder)
    assert recorder.ended == 1
    assert torch.equal(speculated(target, "deep/moved", draft="deep/moved"), want)
    small_draft(target, seed=3).save_pretrained(draft)
    with pytest.raises(ValueError, match="holds another by now"):
        speculated(target, "deep/moved")


def test_on_a_hub_its_name_and_revision_are_the_modules(target, monkeypatch):
    asked = []
    monkeypatch.setattr(
        BeagleDraft, "from_pretrained", lambda name, **more: asked.append((name, more)) or small_draft(target)
    )
    module = "transformers_modules._01_hyphen_me.my_hyphen_draft_dot_v1.0abc.custom_generate.generate"
    settings = {"do_sample": False, "max_new_tokens": 4}
    made = generate_saved(target, module, "/gone", "x", inputs=prompts(1), token="t", revision="main", **settings)
    assert torch.equal(made, target.generate(prompts(1), **settings))
    assert asked == [("01-me/my-draft.v1", {"token": "t", "revision": "0abc"})]


def test_push_to_hub_takes_it_along(target, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(BeagleDraft, "push_to_hub", lambda self, name, **more: pushed.update(name=name, **more))
    small_draft(target).save_pretrained(tmp_path / "draft", push_to_hub=True, private=True)
    assert pushed == {"name": "draft", "private": True}
    assert (tmp_path / "draft" / "custom_generate" / "generate.py").is_file()
