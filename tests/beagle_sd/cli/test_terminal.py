"""What a terminal, a home folder or a base model may lack: the answer goes on, or a line says the way."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from models import small_draft, small_target
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

from beagle_sd.cli.app import app
from beagle_sd.cli.console import clear_errors, console
from beagle_sd.cli.generate import RunStreamer, as_text, table
from beagle_sd.files import cache_folder
from beagle_sd.models import smollm2


class Emoji:
    def decode(self, ids, skip_special_tokens):
        return "\N{PARTY POPPER} caf\u00e9"


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):

    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", errors="strict"))
    with clear_errors():
        streamer = RunStreamer(console, Emoji())
        for value in (torch.tensor([[1]]), torch.tensor([2])):
            streamer.put(value)
        streamer.end()
        console.print(table({}))
    sys.stdout.flush()
    assert screen.getvalue().startswith(b"? caf?\n+--")


@pytest.mark.parametrize("text", ["plain", "caf\u00e9"])
def test_an_argument_is_utf_8_whatever_the_locale(text):
    assert as_text(text.encode().decode("ascii", "surrogateescape")) == text == as_text(text)
    for wrong in ("a\udcff", "a\ud83d"):
        with pytest.raises(ValueError, match="no text in UTF-8.*allowed: UTF-8"):
            as_text(wrong)


def test_a_base_model_is_told_of_raw(tmp_path):
    target, tokenizer = small_target(), small_tokenizer()
    tokenizer.chat_template = None
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    small_draft(target).save_pretrained(tmp_path / "draft")
    (tmp_path / "a.txt").write_text("abc\nbcd\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "abc"}]}) + "\n")
    models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--max-new-tokens", "4"]
    generate = ["generate", "abc", "--tree", "2,2,3", *models]
    for line in (generate, ["bench", "--prompts", str(tmp_path / "a.txt"), *models]):
        said = CliRunner().invoke(app, line, env={"COLUMNS": "300", "BEAGLE_CACHE": str(tmp_path)})
        assert said.exit_code == 1 and "no chat template" in said.output and "--raw for `generate`" in said.output
    assert CliRunner().invoke(app, [*generate, "--raw", "--no-compare"]).exit_code == 0


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "a.gguf")
    said = CliRunner().invoke(app, ["generate", "a"], env={"COLUMNS": "300"})
    assert said.exit_code == 1
    assert "smollm2-135m, converted once for transformers, cannot be kept in the cache folder" in said.output
    assert "allowed: a folder that can be written, which BEAGLE_CACHE names" in said.output


def test_a_user_without_a_home_is_told_of_it(monkeypatch):
    for name in ("BEAGLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", missing)
    with pytest.raises(OSError, match="home directory.*BEAGLE_CACHE"):
        cache_folder()
    said = CliRunner().invoke(app, ["info"])
    assert said.exit_code == 1 and "BEAGLE_CACHE" in said.output
