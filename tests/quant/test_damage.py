"""Damage to the tensors of an export, each kind with the sentence that names it, and what evidence, probe and reference find.
Nothing undamaged may be reported as an error."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from quant.evidence import FILE
from quant.pack import pack, unpack
from quant.served import Serving
from quant.source import InMemory
from quant.verify import verify
from quant.verify_training import Training
from tests.quant.damage import DOWN, GATE, INDEX, LOGITS, OTHER, SCALE, SHAPE, SPECS, UP, WEIGHTS, WORDS, errors, in_json
from tests.quant.small_model import INT4, MODEL
from tests.quant.test_export import read_all


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
