"""An export to damage, and ways to change its files. Fixtures: tests/quant/conftest.py."""

import json

import numpy as np
from safetensors.numpy import save_file

from quant.verify import verify
from tests.quant.small_model import MODEL, random_weights, specs_of

SPECS = specs_of(MODEL)
WEIGHTS = random_weights(SPECS)
EXPERT = "model.layers.1.mlp.experts.0."
GATE, UP, DOWN = (f"{EXPERT}{p}_proj." for p in ("gate", "up", "down"))
OTHER = "model.layers.1.mlp.experts.1.gate_proj."
WORDS, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
TOKENS = np.array([[1, 2, 3, 4]])
LOGITS = np.random.default_rng(0).normal(size=(1, 4, MODEL.vocab_size)).astype(np.float32)


def errors(directory, **more):
    return [f"[{f.check}] {f.message}" for f in verify(directory, **more).of("error")]


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
