"""How guides are made: what they allow, what they refuse, and whose tokens they speak of."""

from __future__ import annotations

import importlib
import json
import random
import sys
from types import SimpleNamespace

import pytest
from guide_cases import ENDS, SCHEMA, TEXT, fresh_walk, mask_of, plain_text, tokens_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from beagle_sd.decoding.guides.guide import Guide, guide_of_processor

SIZE = 49152
GBNF = 'root ::= "yes" | "no" " "+'
LARK = 'start: "yes" | "no" " "+'


def allows(guide: Guide, tokenizer, text: str) -> bool:
    """Whether the guide takes the text as the tokenizer writes it, and may end there."""
    walk = fresh_walk(guide, tokenizer(text, add_special_tokens=False).input_ids)
    return walk is not None and guide.ends <= set(tokens_of(mask_of(walk)[0]))


def test_a_schema_allows_its_texts_alone(tokenizer, library):
    for whitespace in (True, False):
        guide = Guide.json(SIZE, tokenizer, SCHEMA, whitespace=whitespace, library=library)
        assert allows(guide, tokenizer, TEXT) and not allows(guide, tokenizer, TEXT[:-1])
        assert allows(guide, tokenizer, json.dumps(json.loads(TEXT), ensure_ascii=False)) == whitespace
        assert not allows(guide, tokenizer, TEXT.replace("42", "420"))
        assert not allows(guide, tokenizer, TEXT.replace("río", "rio"))
    same = Guide.json(SIZE, tokenizer, json.dumps(SCHEMA), library=library)
    assert allows(same, tokenizer, TEXT)


@pytest.mark.parametrize("text", ["[]", "-1e5", '"a"', '{"a": [null, {"b": "ü"}]}'])
def test_without_a_schema_all_json_is_allowed(tokenizer, library, text):
    assert allows(Guide.json(SIZE, tokenizer, library=library), tokenizer, text)
    assert not allows(Guide.json(SIZE, tokenizer, library=library), tokenizer, text + "]")


def test_a_pattern_is_the_whole_text_and_its_digits_are_ascii(tokenizer, library):
    guide = Guide.regex(SIZE, tokenizer, r"\d{3}-\d{4}", library=library)
    assert allows(guide, tokenizer, "123-4567")
    for wrong in ("123-456", "x123-4567", "123-45678", "١٢٣-4567"):
        assert not allows(guide, tokenizer, wrong)
    assert allows(Guide.regex(SIZE, tokenizer, "a/b+", library=library), tokenizer, "a/bb")


@pytest.mark.parametrize("grammar", [GBNF, LARK])
def test_grammars_of_both_kinds(tokenizer, library, grammar):
    guide = Guide.grammar(SIZE, tokenizer, grammar, library=library)
    assert allows(guide, tokenizer, "yes") and allows(guide, tokenizer, "no  ") and not allows(guide, tokenizer, "no")


def test_llguidances_own_grammars(tokenizer):
    llguidance = pytest.importorskip("llguidance", reason="needs: pip install llguidance")
    written = llguidance.LLMatcher.grammar_from_json_schema({"enum": [1, 2]})
    guide = Guide.grammar(SIZE, tokenizer, written)
    assert allows(guide, tokenizer, "2") and not allows(guide, tokenizer, "3")
    assert tokens_of(mask_of(Guide.grammar(SIZE, tokenizer, "start: <|im_start|> | /a/").begin())[0])[0] == 1


@pytest.mark.parametrize(
    "kind, given, reason",
    [
        ("json", '{"type": ', "the schema"),
        ("json", {"type": "nope"}, "nope"),
        ("regex", "(ab", r"the pattern \(ab"),
        ("grammar", "root ::= missing", "the grammar .*missing"),
        ("grammar", "start: missing", "the grammar .*missing"),
        ("grammar", "no grammar", "the grammar no grammar"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_librarys_reason(tokenizer, library, kind, given, reason):
    with pytest.raises(ValueError, match=f"(?s){library} cannot use.*{reason}") as raised:
        getattr(Guide, kind)(SIZE, tokenizer, given, library=library)
    assert ".cc:" not in str(raised.value) and "<state>" not in str(raised.value)


def test_arguments_out_of_range(tokenizer, library):
    with pytest.raises(ValueError, match="library is 'outlines'; allowed: xgrammar, llguidance, auto"):
        Guide.json(SIZE, tokenizer, library="outlines")
    with pytest.raises(ValueError, match="end token 49152 lies outside"):
        Guide.json(SIZE, tokenizer, library=library, end_tokens=[2, SIZE])
    with pytest.raises(ValueError, match="no end token"):
        Guide.json(SIZE, tokenizer, library=library, end_tokens=[])


def test_a_missing_library_is_named(tokenizer, monkeypatch):
    for name in ("xgrammar", "llguidance"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"pip install {name}"):
            Guide.json(SIZE, tokenizer, library=name)
    with pytest.raises(ImportError, match="pip install xgrammar .*, or pip install llguidance"):
        Guide.json(SIZE, tokenizer)


def test_auto_takes_the_library_that_is_there(tokenizer, library, monkeypatch):
    other = "llguidance" if library == "xgrammar" else "xgrammar"
    monkeypatch.setitem(sys.modules, other, None)
    for made in (
        Guide.json(SIZE, tokenizer),
        Guide.grammar(SIZE, tokenizer, GBNF),
        Guide.grammar(SIZE, tokenizer, LARK),
    ):
        assert type(made).__module__.endswith(f"by_{library}")


def test_sizes_and_ends_are_the_models(tokenizer, library):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=49280))
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[0, 3]))
    guide = Guide.regex(model, tokenizer, "b", library=library)
    assert (guide.vocab_size, guide.ends) == (49280, {0, 3})
    walk = fresh_walk(guide, tokenizer("b").input_ids)
    assert tokens_of(mask_of(walk)[0]) == [0, 3]
    model.generation_config.eos_token_id = None
    assert Guide.regex(model, tokenizer, "b", library=library).ends == {tokenizer.eos_token_id}
    assert Guide.regex(model, tokenizer, "b", library=library, end_tokens=4).ends == {4}


def test_tokens_that_a_tokenizer_gets_later_are_known(library):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_tokens(["abc"])
    size = len(tokenizer)
    assert not tokens_of(mask_of(Guide.regex(size + 5, tokenizer, "xyz", library=library).begin())[0])[1:]
    tokenizer.add_tokens(["xyz"])
    assert size in tokens_of(mask_of(Guide.regex(size + 5, tokenizer, "xyz", library=library).begin())[0])


def test_a_model_with_fewer_tokens_than_the_tokenizer(tokenizer, library):
    """Masks are those of all tokens, cut."""
    whole = mask_of(Guide.json(SIZE, tokenizer, library=library).begin())
    cut = Guide.json(40_001, tokenizer, library=library)
    assert tokens_of(mask_of(cut.begin())[0]) == [token for token in tokens_of(whole[0]) if token < 40_001]
    assert fresh_walk(cut, [40_001]) is None


def test_special_tokens_are_no_text(tokenizer, library):
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    assert len(special) > 10
    guide = Guide.regex(SIZE, tokenizer, "[^a]*", library=library, end_tokens=2)
    walk = guide.begin()
    assert set(tokens_of(mask_of(walk)[0])) & set(special) == {2}
    with pytest.raises(ValueError, match="token 1 was emitted"):
        walk.accept([1])


def test_an_end_token_that_is_text_comes_at_the_end_alone(tokenizer, library):
    (line,) = tokenizer("\n").input_ids
    guide = Guide.regex(SIZE, tokenizer, r"(a|\n)*b", library=library, end_tokens=[2, line])
    walk = fresh_walk(guide, tokenizer("a").input_ids)
    assert not {2, line} & set(tokens_of(mask_of(walk)[0]))
    walk.accept(tokenizer("b").input_ids)
    assert tokens_of(mask_of(walk)[0]) == [2, line] and walk.ended


def test_strings_of_a_length_hold_no_control_characters(tokenizer, library):
    guide = Guide.json(SIZE, tokenizer, {"type": "string", "maxLength": 3}, library=library)
    walk = fresh_walk(guide, tokenizer('"').input_ids)
    texts = [tokenizer.decode([token]) for token in tokens_of(mask_of(walk)[0])]
    assert len(texts) > 1000 and not [text for text in texts if any(char < " " for char in text)]


def test_both_libraries_allow_the_same(tokenizer):
    """What one writes the other takes."""
    for name in ("xgrammar", "llguidance"):
        pytest.importorskip(name, reason=f"needs: pip install {name}", exc_type=ImportError)
    rng = random.Random(5)
    one, other = (
        Guide.json(SIZE, tokenizer, SCHEMA, whitespace=False, library=name) for name in ("xgrammar", "llguidance")
    )
    for guide, judge in ((one, other), (other, one)):
        tokens = plain_text(guide, tokenizer, rng.choice, 400)
        walk = judge.begin()
        walk.accept(tokens)
        assert walk.ended


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama 2: a space is ▁, and what has no token of its own is written in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'abc{}":,[]0123456789▁', '{"']
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [("{", '"')], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", bos_token="<s>")


def test_bytes_and_spaces_of_a_sentencepiece_vocabulary(library):
    tokenizer = sentencepiece_tokenizer()
    guide = Guide.json(320, tokenizer, {"enum": [{"a": "b ü"}]}, whitespace=False, library=library)
    assert allows(guide, tokenizer, '{"a":"b ü"}')
    text = tokenizer('{"a":"b ü').input_ids
    assert text[-2:] == [3 + 0xC3, 3 + 0xBC], "ü is two bytes"
    walk = fresh_walk(guide, text[:-1])
    assert tokens_of(mask_of(walk)[0]) == text[-1:]
    assert tokenizer.decode(plain_text(guide, tokenizer, max, 40)[:-1]) == '{"a":"b ü"}'


def test_compiled_grammars_and_transformers_processor(tokenizer):
    xgrammar = pytest.importorskip("xgrammar", reason="needs: pip install xgrammar", exc_type=ImportError)
    hf = importlib.import_module("xgrammar.contrib.hf")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=49280, stop_token_ids=ENDS)
    digits, words = (xgrammar.GrammarCompiler(info).compile_regex(pattern) for pattern in ("[0-9]+", "[a-z]+"))
    guide = Guide.compiled(digits)
    assert (guide.vocab_size, guide.ends) == (49280, set(ENDS)) and allows(guide, tokenizer, "42")
    assert Guide.compiled(digits, end_tokens=3).ends == {3}
    assert tokens_of(mask_of(fresh_walk(Guide.compiled(words, end_tokens=3), tokenizer("b").input_ids))[0])[0] == 3
    with pytest.raises(ValueError, match="is str; allowed: xgrammar.CompiledGrammar"):
        Guide.compiled("start: /a/")

    taken = guide_of_processor(hf.LogitsProcessor(digits))
    assert isinstance(taken, Guide) and allows(taken, tokenizer, "42") and not allows(taken, tokenizer, "a")
    first, second, third = guide_of_processor(hf.LogitsProcessor([digits, words, digits]))
    assert allows(second, tokenizer, "abc") and first is third and first is not second
    assert guide_of_processor(SimpleNamespace(compiled_grammars=[digits])) is None
