"""The byte tokenizer, alone and as Hugging Face's `tokenizers` reads its file."""

import json

import numpy as np
import pytest
import tokenizers

from configs.schema import ConfigError, ModelConfig
from data.chat_template import template_settings
from data.tokenizer import SPECIAL_NAMES, load_tokenizer

TEXTS = ["", "plain", "ÄÖ 漢字 🙂\n\t", "<|im_end|>[EOS]</think>", "".join(map(chr, range(1, 300)))]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_no_special_id_from_text(text):
    tok = load_tokenizer("bytes")
    ids = tok.encode(text)
    assert ids == list(text.encode()) and tok.decode(ids) == text
    assert tok.byte_lengths[ids].sum() == len(text.encode())


def test_special_tokens():
    tok = load_tokenizer("bytes")
    model = ModelConfig()
    assert (tok.vocab_size, tok.bos_id, tok.pad_id, tok.eos_id) == (
        model.vocab_size,
        model.bos_token_id,
        model.pad_token_id,
        model.eos_token_id,
    )
    assert sorted(tok.special.values()) == list(range(256, 273))
    assert tok.decode([104, 258, 105]) == "h<|im_end|>i"
    assert tok.decode([0xC3, 273, 300]) == "\ufffd" * 3 + "\ufffd"
    assert tok.stop_ids == (tok.special["<|im_end|>"], tok.special["[EOS]"])
    assert not tok.byte_lengths[256:273].any()
    with pytest.raises(ValueError, match="320"):
        tok.decode([320])


def test_saved_file_means_the_same_to_hugging_face(tmp_path):
    tok = load_tokenizer("bytes")
    tok.save(tmp_path, system='You are "small".')
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:3] + TEXTS[4:]:
        assert theirs.encode(text).ids == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    for name in SPECIAL_NAMES:
        assert theirs.encode(f"a{name}b").ids == [97, tok.special[name], 98]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert 'default_system = "You are \\"small\\"."' in (tmp_path / "chat_template.jinja").read_text()


@pytest.mark.parametrize("system", [None, "", 'quick" -%}\n{%- set x = "', "\u2028 ü \\n"])
@pytest.mark.parametrize("mode, thoughts", [("interleaved", {}), ("last_segment", {}), ("preserved", {"mode": "preserved"})])
def test_a_saved_template_says_how_it_was_trained(tmp_path, system, mode, thoughts):
    load_tokenizer("bytes").save(tmp_path, system, mode)
    assert template_settings(tmp_path) == ({} if system is None else {"system": system}) | thoughts
    (tmp_path / "chat_template.jinja").write_text('{%- set default_system = "\\x" -%}\n')
    with pytest.raises(ConfigError, match="chat_template.jinja: default_system in the first line is no JSON text"):
        template_settings(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert template_settings(tmp_path) == {}


def test_missing_file_is_one_sentence():
    with pytest.raises(ConfigError, match="no file nowhere.json"):
        load_tokenizer("nowhere.json")


def test_lone_surrogates_do_not_raise():
    assert load_tokenizer("bytes").encode("a\ud800b") == list(b"a?b")
    assert np.array(load_tokenizer("bytes").encode("é")).tolist() == [0xC3, 0xA9]
