"""Kinds of damage to an export, each with the sentence that names it. Nothing undamaged may be reported as an error."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import launch
from data.tokenizer import ByteTokenizer
from quant.evidence import FILE, Probe
from quant.export import export_model
from quant.pack import pack, unpack
from quant.served import Serving
from quant.source import InMemory
from quant.verify import verify
from quant.verify_training import Training
from tests.quant.small_model import INT4, MODEL, random_weights, specs_of
from tests.quant.test_export import read_all

SPECS = specs_of(MODEL)
WEIGHTS = random_weights(SPECS)
EXPERT = "model.layers.1.mlp.experts.0."
GATE, UP, DOWN = (f"{EXPERT}{p}_proj." for p in ("gate", "up", "down"))
OTHER = "model.layers.1.mlp.experts.1.gate_proj."
WORDS, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
TOKENS = np.array([[1, 2, 3, 4]])
LOGITS = np.random.default_rng(0).normal(size=(1, 4, MODEL.vocab_size)).astype(np.float32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage") / "int4"
    export_model(InMemory(WEIGHTS), SPECS, MODEL, INT4, directory, tokenizer=ByteTokenizer(), probe=Probe.of(TOKENS, LOGITS))
    return directory


@pytest.fixture
def copy(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "copy")


def errors(directory, **more):
    return [f"[{f.check}] {f.message}" for f in verify(directory, **more).of("error")]


def codes_of(change):
    """A change of the codes of the first gate projection."""

    def apply(t):
        t[GATE + WORDS] = pack(change(unpack(t[GATE + WORDS])))

    return apply


def swap(*pairs):
    def apply(t):
        for a, b in pairs:
            t[a], t[b] = t[b], t[a]

    return apply


def put(name, change):
    def apply(t):
        t[name] = np.ascontiguousarray(change(t[name].copy()))

    return apply


def flip_bit(a):
    a.reshape(-1).view(np.uint8)[20] ^= 4
    return a


def rewritten(a):
    a[3, 2:5] ^= 0x01010101
    return a


def nan(a):
    a[0, 0] = np.nan
    return a


def zero_at(a):
    a[0, 0] = 0
    return a


TENSORS = {
    "gate and up swapped": (swap((GATE + WORDS, UP + WORDS)), f"{GATE}weight_packed.*{UP}weight_packed.*swapped"),
    "experts swapped": (swap((GATE + WORDS, OTHER + WORDS), (GATE + SCALE, OTHER + SCALE)), f"{GATE}.*{OTHER}.*swapped"),
    "one expert copied over another": (
        lambda t: t.update({OTHER + WORDS: t[GATE + WORDS]}),
        f"{OTHER}.* holds the values of {GATE}",
    ),
    "nibbles reversed": (codes_of(lambda q: q.reshape(-1, 8)[:, ::-1].reshape(q.shape)), "nibbles of every word are in reverse"),
    "nibbles exchanged": (codes_of(lambda q: q.reshape(-1, 2)[:, ::-1].reshape(q.shape)), "nibbles of every byte are exchanged"),
    "AWQ order": (codes_of(lambda q: q.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(q.shape)), "AWQ"),
    "two's complement": (put(GATE + WORDS, lambda w: w ^ np.int32(-0x77777778)), "two's complement"),
    "bytes reversed": (put(GATE + WORDS, lambda w: w.byteswap()), "bytes of every value are in reverse order"),
    "groups reversed": (codes_of(lambda q: q.reshape(32, 2, 32)[:, ::-1].reshape(q.shape)), "groups of every row are in reverse"),
    "rows shifted": (put(DOWN + WORDS, lambda w: np.roll(w, 1, 0)), "rows are shifted by one"),
    "scales shifted": (put(DOWN + SCALE, lambda s: np.roll(s, 1, 0)), "weight_scale.*rows are shifted by one"),
    "scales of a row exchanged": (put(GATE + SCALE, lambda s: s[:, ::-1]), "weight_scale.*columns are in reverse"),
    "rows permuted": (
        put(GATE + WORDS, lambda w: w[np.random.default_rng(0).permutation(32)]),
        "same 32-bit words lie in another",
    ),
    "sign flipped": (put(GATE + SCALE, lambda s: -s), "opposite sign"),
    "a bit flipped": (put(GATE + WORDS, flip_bit), r"bit 2 of word 5 \(row 0\) is flipped"),
    "a bit flipped in a norm": (put("model.norm.weight", flip_bit), r"model.norm.weight.*bit 2 of word 5"),
    "some words rewritten": (put(GATE + WORDS, rewritten), "several values were changed"),
    "router bias zeroed": (put("model.layers.1.mlp.gate.e_score_correction_bias", np.zeros_like), "set to zero"),
    "transposed": (put("model.layers.0.self_attn.o_proj.weight", lambda w: w.T.reshape(w.shape)), "stored transposed"),
    "all codes scaled": (put(GATE + SCALE, lambda s: (s.astype(np.float32) * 1.5).astype(ml_dtypes.bfloat16)), "several values"),
    "code of -8": (codes_of(lambda q: np.where(q == -7, -8, q).astype(np.int8)), "several values"),
    "scale not a number": (put(GATE + SCALE, nan), "not finite"),
    "scale of zero": (put(GATE + SCALE, zero_at), "scales of zero over codes"),
    "norm not a number": (
        put("model.norm.weight", lambda a: np.full_like(a, np.nan)),
        "model.norm.weight has 64 values that are not",
    ),
    "scales in f32": (put(GATE + SCALE, lambda s: s.astype(np.float32)), r"\[dtype\].*weight_scale is F32"),
    "words in int64": (put(GATE + WORDS, lambda w: w.astype(np.int64)), r"\[dtype\].*weight_packed is I64"),
    "wrong weight_shape": (put(GATE + SHAPE, lambda s: s[::-1]), r"weight_shape says \[64, 32\]"),
    "no scales": (lambda t: t.pop(GATE + SCALE), r"\[parts\].*lacks weight_scale"),
    "scales of another group": (put(GATE + SCALE, lambda s: s.repeat(2, 1)), r"groups of 32 need \[32, 2\]"),
    "projection too small": (
        lambda t: t.update(
            {GATE + WORDS: t[GATE + WORDS][:16], GATE + SCALE: t[GATE + SCALE][:16], GATE + SHAPE: np.array([16, 64], np.int32)}
        ),
        r"config.json implies \[32, 64\]",
    ),
    "missing": (lambda t: t.pop("model.layers.2.input_layernorm.weight"), r"\[names\].*random numbers"),
    "extra": (lambda t: t.update({"model.layers.1.gift": np.zeros(3, np.float32)}), r"\[names\].*no tensor of this network"),
    "stored plain": (
        lambda t: (
            [t.pop(GATE + p) for p in (WORDS, SCALE, SHAPE)]
            and t.update({GATE + "weight": np.ones((32, 64), ml_dtypes.bfloat16)})
        ),
        r"\[ignore list\].*gate_proj is stored plain",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_damage_to_tensors_is_named(copy, kind):
    change, sentence = TENSORS[kind]
    file = copy / "model-00001-of-000001.safetensors"
    tensors = read_all(copy)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    found = errors(copy)
    assert any(re.search(sentence, message) for message in found), found


def in_json(name, change):
    def apply(directory):
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return apply


def weights_section(config):
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


def cut_off(directory):
    file = next(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


def broken_header(directory):
    file = next(directory.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[20] = 0
    file.write_bytes(data)


def in_header(change):
    def apply(directory):
        file = next(directory.glob("*.safetensors"))
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return apply


def renamed(old, new):
    """A tensor under another name."""
    return in_header(lambda h: h.update({new: h.pop(old)}))


def first_tokens_swapped(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    (a, i), (b, j), *_ = vocabulary.items()
    vocabulary.update({a: j, b: i})


def second_copy(directory):
    save_file({"model.norm.weight": np.ones(64, np.float32)}, directory / "model-00002-of-000001.safetensors")


INDEX = "model.safetensors.index.json"
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


def test_the_undamaged_export_has_no_errors(pristine):
    report = verify(pristine, logits=lambda tokens: LOGITS)
    assert report.ok, str(report)
    assert "all codes on" not in str(report) and "probe agree" in str(report)


def test_evidence_covers_what_was_exported_and_nothing_else(copy):
    """Files of the user's are no damage, and neither is evidence from before the tokenizer's files were recorded."""
    (copy / "added_tokens.json").write_text("{}")
    assert verify(copy).ok
    assert set(json.loads((copy / FILE).read_text())["files"]) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    in_json(FILE, lambda c: c.pop("files"))(copy)
    report = verify(copy)
    assert report.ok and "no hashes of the tokenizer's files" in report.of("not checkable")[0].message


COMMANDED = {
    "8 bits": (FILES["8 bits claimed"][0], "num_bits is 8"),
    "another activation": (in_config(hidden_act="gelu"), 'hidden_act was "silu" when exported and is "gelu"'),
    "cut off": (cut_off, "header announces"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "a size null": (in_config(hidden_size=None), "hidden_size is None"),
    "tensor gone": (renamed(NORM, "gift"), f"{NORM} was exported but is gone"),
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


def test_without_evidence_a_swap_is_not_checkable(copy):
    (copy / FILE).unlink()
    report = verify(copy)
    assert report.ok and "cannot be seen" in report.of("not checkable")[0].message


def test_another_function_fails_the_probe(pristine):
    assert any("differ by" in message for message in errors(pristine, logits=lambda tokens: LOGITS[..., ::-1]))


def test_the_reference_catches_what_evidence_was_forged_for(copy):
    """Damage with evidence rewritten to match: only the training weights can tell."""
    other = dict(WEIGHTS, **{"moe.mlp.experts_down": WEIGHTS["moe.mlp.experts_down"] + np.float32(1e-2)})
    found = errors(copy, training=Training(InMemory(other), SPECS, Serving.of(MODEL, INT4)))
    assert len(found) == 8 and all("differ from those the training forward used" in message for message in found)


def test_another_family_is_checked_as_far_as_it_goes(copy):
    """Words, scales, ignore list and grid need no knowledge of the network; which tensors it needs does."""
    in_json("config.json", lambda c: c.update(model_type="qwen3_moe"))(copy)
    (copy / FILE).unlink()
    report = verify(copy)
    assert report.ok and any("which tensors it needs is not known" in f.message for f in report.of("not checkable"))
    in_json("config.json", lambda c: c["quantization_config"].update(ignore=[]))(copy)
    assert any("not in the ignore list" in message for message in errors(copy))


def test_a_wrapped_language_model_is_checked_under_its_prefix(copy):
    file = copy / "model-00001-of-000001.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in read_all(copy).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name in (INDEX, FILE):
        (copy / name).unlink()
    text = json.loads((copy / "config.json").read_text())
    text["quantization_config"]["ignore"][0] = "language_model.lm_head"
    config = {"model_type": "kimi_k25", "text_config": text, "quantization_config": text.pop("quantization_config")}
    (copy / "config.json").write_text(json.dumps(config))
    assert verify(copy).ok, str(verify(copy))
    save_file({name: t for name, t in tensors.items() if not name.endswith("model.norm.weight")}, file)
    assert any("language_model.model.norm.weight is missing" in message for message in errors(copy))


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
