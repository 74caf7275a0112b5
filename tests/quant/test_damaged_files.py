"""Damage to the files of an export, their headers and configs, each kind with the sentence that names it; none is a crash."""

import json
import re

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

import launch
from quant.evidence import FILE
from quant.verify import verify
from tests.quant.damage import (
    INDEX,
    LOGITS,
    broken_header,
    cut_off,
    errors,
    first_tokens_swapped,
    in_header,
    in_json,
    renamed,
    second_copy,
    weights_section,
)

FILES = {
    "shard cut off": (cut_off, "header announces"),
    "header overwritten": (broken_header, "unreadable header"),
    "tensor stored twice": (second_copy, "stored twice"),
    "config missing": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "index entry missing": (in_json(INDEX, lambda c: c["weight_map"].pop("model.norm.weight")), "not in the index"),
    "index names another file": (
        in_json(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "x.safetensors"})),
        "does not exist",
    ),
    "index names a tensor that is not there": (
        in_json(INDEX, lambda c: c["weight_map"].update({"ghost": "model-00001-of-000001.safetensors"})),
        "in no file",
    ),
    "8 bits claimed": (in_json("config.json", lambda c: weights_section(c).update(num_bits=8)), "num_bits is 8"),
    "another group claimed": (in_json("config.json", lambda c: weights_section(c).update(group_size=64)), "groups of 64 need"),
    "asymmetry claimed": (in_json("config.json", lambda c: weights_section(c).update(symmetric=False)), "symmetric is False"),
    "order claimed": (in_json("config.json", lambda c: weights_section(c).update(actorder="weight")), "actorder"),
    "format missing": (in_json("config.json", lambda c: c["quantization_config"].pop("format")), "SGLang looks for"),
    "quantisation unmentioned": (
        in_json("config.json", lambda c: c.pop("quantization_config")),
        "config.json says nothing of it",
    ),
    "ignore list too short": (
        in_json("config.json", lambda c: c["quantization_config"].update(ignore=["lm_head"])),
        "stored plain but not in the ignore list",
    ),
    "ignore list too long": (
        in_json("config.json", lambda c: c["quantization_config"]["ignore"].append("re:.*experts.*")),
        "packed but matched by the ignore list",
    ),
    "width edited": (in_json("config.json", lambda c: c.update(moe_intermediate_size=16)), r"config.json implies \[16, 64\]"),
    "theta edited": (in_json("config.json", lambda c: c.update(rope_theta=10000.0)), "rope_theta was 50000.0"),
    "field removed": (in_json("config.json", lambda c: c.pop("n_routed_experts")), "lacks n_routed_experts"),
    "config emptied": (lambda d: (d / "config.json").write_text("{}"), "hidden_size was 64 when exported and is null"),
    "evidence unreadable": (lambda d: (d / FILE).write_text("[]"), "evidence.json is unreadable"),
    "two tokens exchanged": (in_json("tokenizer.json", first_tokens_swapped), "tokenizer.json is not the one that was exported"),
    "another end token": (
        in_json("tokenizer_config.json", lambda c: c.update(eos_token="[EOS]")),
        "tokenizer_config.json is not the one",
    ),
    "template edited": (lambda d: (d / "chat_template.jinja").write_text(""), "chat_template.jinja is not the one"),
    "stops removed": (
        in_json("generation_config.json", lambda c: c.pop("eos_token_id")),
        "generation_config.json is not the one",
    ),
    "tokenizer gone": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json was exported but is gone"),
}


@pytest.mark.parametrize("kind", FILES)
def test_damage_to_files_is_named(copy, kind):
    change, sentence = FILES[kind]
    change(copy)
    found = errors(copy)
    assert any(re.search(sentence, message) for message in found), found


NORM = "model.layers.2.input_layernorm.weight"
UNOPENED = {
    "two tensors share their bytes": (
        lambda h: h["model.layers.1.input_layernorm.weight"].update(data_offsets=h[NORM]["data_offsets"]),
        "starts at byte .* ends at",
    ),
    "bytes that are no tensor's": (lambda h: h.pop(NORM), "starts at byte .* ends at"),
    "metadata that is no text": (lambda h: h.update(__metadata__={"format": 1}), "unreadable header"),
    "a size that is true": (lambda h: h[NORM].update(shape=[True, 64]), "holds no sizes"),
}


@pytest.mark.parametrize("kind", UNOPENED)
def test_what_the_library_does_not_open_is_not_sound(copy, kind):
    """Without evidence, which would find it in another way."""
    change, sentence = UNOPENED[kind]
    in_header(change)(copy)
    (copy / FILE).unlink()
    with pytest.raises(SafetensorError):
        load_file(next(copy.glob("*.safetensors")))
    assert any(re.search(sentence, message) for message in errors(copy)), errors(copy)


def in_config(**changes):
    return in_json("config.json", lambda c: c.update(changes))


def in_quantization(**changes):
    return in_json("config.json", lambda c: c["quantization_config"].update(changes))


def directory_in_place_of(name):
    def apply(directory):
        (directory / name).unlink()
        (directory / name).mkdir()

    return apply


MALFORMED = {
    "quantization_config a list": (in_config(quantization_config=[1]), r"quantization_config is \[1\], not an object"),
    "quantization_config a text": (in_config(quantization_config="int4"), "quantization_config is 'int4', not an object"),
    "text_config a list": (in_config(text_config=[], quantization_config=None), "config.json says nothing of it"),
    "config_groups a list": (in_quantization(config_groups=[{}]), "config_groups is .*not an object"),
    "a group that is a text": (in_quantization(config_groups={"group_0": "W4A16"}), "group_0 is 'W4A16', not an object"),
    "weights a list": (in_quantization(config_groups={"g": {"weights": [4]}}), r"g.weights is \[4\], not an object"),
    "group size a text": (in_json("config.json", lambda c: weights_section(c).update(group_size="32")), "group_size is '32'"),
    "rope_scaling a text": (in_config(rope_scaling="yarn"), "rope_scaling is 'yarn', not an object"),
    "nothing ignored": (in_quantization(ignore=None), "lm_head is stored plain but not in the ignore list"),
    "ignore a text": (in_quantization(ignore="lm_head"), "ignore is 'lm_head', not a list"),
    "ignore no texts": (in_quantization(ignore=[None]), r"ignore is \[None\], not a list"),
    "ignore no pattern": (in_quantization(ignore=["re:("]), r"'re:\(' is no regular expression"),
    "size null": (in_config(hidden_size=None), "hidden_size is None, not a size"),
    "size a text": (in_config(moe_intermediate_size="32"), "moe_intermediate_size is '32', not a size"),
    "size true": (in_config(n_shared_experts=True), "n_shared_experts is True, not a size"),
    "rank a text": (in_config(q_lora_rank="32"), "q_lora_rank is '32', not a size"),
    "layer x": (renamed(NORM, "model.layers.x.weight"), "model.layers.x.weight is no tensor of this network"),
    "no layer": (renamed(NORM, "model.layers"), "model.layers is no tensor of this network"),
    "dtype a list": (in_header(lambda h: h[NORM].update(dtype=["F32"])), f"{NORM} has dtype .'F32'., which is not read"),
    "header in another encoding": (
        lambda d: next(d.glob("*.safetensors")).write_bytes((4).to_bytes(8, "little") + "{}".encode("utf-16-le")),
        "unreadable header",
    ),
    "weight_map a list": (in_json(INDEX, lambda c: c.update(weight_map=[])), "holds no weight_map"),
    "evidence without config": (in_json(FILE, lambda c: c.pop("config")), "evidence.json is unreadable"),
    "evidence of a list": (in_json(FILE, lambda c: c.update(tensors=[])), "evidence.json is unreadable"),
    "evidence of a sum that is text": (
        in_json(FILE, lambda c: c["tensors"].update({NORM: ["BF16", [64], "0", "0", "0"]})),
        "evidence.json is unreadable",
    ),
    "files a list": (in_json(FILE, lambda c: c.update(files=[])), "evidence.json is unreadable"),
    "probe a list": (in_json(FILE, lambda c: c.update(probe=[1])), "the probe could not be repeated"),
    "probe beyond the vocabulary": (
        in_json(FILE, lambda c: c["probe"].update(tokens=[[1, 2, 3, 999]])),
        "the probe could not be repeated",
    ),
    "config nested without end": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "config a directory": (directory_in_place_of("config.json"), "config.json cannot be opened .Is a directory.; restore it"),
    "index a directory": (directory_in_place_of(INDEX), f"{INDEX} cannot be opened"),
    "evidence a directory": (directory_in_place_of(FILE), "evidence.json is unreadable"),
    "a link without its file": (lambda d: (d / "a.safetensors").symlink_to("gone"), "No such file"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_config_or_header_at_all_is_an_error_and_no_crash(copy, kind):
    change, sentence = MALFORMED[kind]
    change(copy)
    found = errors(copy, logits=lambda tokens: LOGITS)
    assert any(re.search(sentence, message) for message in found), found


@pytest.mark.parametrize("bad", [None, "x", [], {}, True, -1, 0.5, [None], float("inf")], ids=repr)
def test_no_value_of_a_config_makes_verify_crash(copy, bad, monkeypatch):
    """Every field with every kind of value. The tensors' numbers, which take the time, are not looked at."""
    monkeypatch.setattr("quant.verify_values.check_values", lambda *_: None)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = {"type": "yarn", "factor": 2.0, "beta_fast": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    (copy / FILE).unlink()
    for part in (
        config,
        config["rope_scaling"],
        config["quantization_config"],
        config["quantization_config"]["config_groups"]["group_0"],
        weights_section(config),
    ):
        for key in part:
            kept, part[key] = part[key], bad
            path.write_text(json.dumps(config))
            assert "is unreadable" not in str(verify(copy)), "a check was given up where a sentence is due"
            part[key] = kept


WARNINGS = {
    "kimi_k2": (lambda c: c.update(model_type="kimi_k2"), "random experts"),
    "softmax in llama.cpp": (lambda c: c.pop("scoring_func"), "llama.cpp then takes softmax"),
    "target by pattern": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:.*"]),
        "SGLang finds",
    ),
    "Kimi's betas": (
        lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
        "--yarn-beta-fast",
    ),
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_what_some_reader_gets_wrong_is_a_warning(copy, kind):
    change, sentence = WARNINGS[kind]
    in_json("config.json", change)(copy)
    assert any(sentence in f.message for f in verify(copy).of("warning")), str(verify(copy))


COMMANDED = {
    "8 bits": (FILES["8 bits claimed"][0], "num_bits is 8"),
    "another activation": (in_config(hidden_act="gelu"), 'hidden_act was "silu" when exported and is "gelu"'),
    "cut off": (cut_off, "header announces"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "a size null": (in_config(hidden_size=None), "hidden_size is None"),
    "tensor gone": (renamed(NORM, "gift"), f"{NORM} was exported but is gone"),
    "config a directory": (directory_in_place_of("config.json"), "config.json cannot be opened"),
}


@pytest.mark.parametrize("kind", COMMANDED)
def test_the_command_prints_all_findings_of_what_cannot_be_run(copy, kind, capsys):
    """Damage that also keeps the probe from being repeated."""
    change, sentence = COMMANDED[kind]
    change(copy)
    assert launch.main(["verify", str(copy)]) == 1
    out, err = capsys.readouterr()
    assert not err
    assert sentence in out and "error: [probe] the probe could not be repeated: " in out and "DAMAGED" in out, out


def test_random_damage_is_reported_and_never_crashes(copy):
    """Two characters at a time, in headers and JSON files."""
    rng = np.random.default_rng(0)
    shard = "model-00001-of-000001.safetensors"
    for name in ("config.json", INDEX, FILE, shard):
        intact = (copy / name).read_bytes()
        reach = 8 + int.from_bytes(intact[:8], "little") if name == shard else len(intact)
        for _ in range(10):
            data = bytearray(intact)
            for at in rng.integers(0, reach, 2):
                data[at] = rng.integers(32, 127)
            (copy / name).write_bytes(data)
            verify(copy)
        (copy / name).write_bytes(intact)
    assert verify(copy).ok
