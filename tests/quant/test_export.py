"""An export re-read: by the safetensors library, by verify, and against the training forward under jit."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from configs.schema import ConfigError
from quant.export import export_model
from quant.layout import all_slots
from quant.served import Serving, as_served
from quant.source import InMemory
from quant.verify import verify
from quant.verify_training import Training
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights, specs_of

SPECS = specs_of(MODEL)
WEIGHTS = random_weights(SPECS)


def read_all(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 -- a file, not a dict
    return tensors


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "int4"
    export_model(InMemory(WEIGHTS), SPECS, MODEL, INT4, directory, shard_bytes=60_000, report={"loss": 1.25})
    return directory


def test_slots_cover_every_value_once_and_invert():
    for slot in all_slots(SPECS):
        block = WEIGHTS[slot.path][slot.block]
        tensor = slot.to_hf(block)
        assert tensor.shape == slot.shape
        back = np.zeros_like(block)
        slot.into(tensor, back)
        np.testing.assert_array_equal(back[slot.within], block[slot.within])


def test_orientation_of_each_kind_of_tensor():
    slots = {s.name: s.to_hf(WEIGHTS[s.path][s.block]) for s in all_slots(SPECS)}
    layer = "model.layers.2."
    np.testing.assert_array_equal(slots[layer + "self_attn.q_b_proj.weight"], WEIGHTS["moe.attn.q_b"][1].reshape(32, -1).T)
    np.testing.assert_array_equal(slots[layer + "self_attn.o_proj.weight"], WEIGHTS["moe.attn.o"][1].reshape(-1, 64).T)
    np.testing.assert_array_equal(slots[layer + "mlp.gate.weight"], WEIGHTS["moe.mlp.router"][1].T)
    np.testing.assert_array_equal(slots[layer + "mlp.experts.3.up_proj.weight"], WEIGHTS["moe.mlp.experts_gate_up"][1, 3, :, 1].T)
    np.testing.assert_array_equal(slots["model.layers.0.mlp.gate_proj.weight"], WEIGHTS["dense.0.mlp.gate_up"][:, 0].T)
    np.testing.assert_array_equal(slots["model.embed_tokens.weight"], WEIGHTS["embed"])
    np.testing.assert_array_equal(slots["lm_head.weight"], WEIGHTS["head"].T)


def test_verify_accepts_the_export_and_proves_it_against_training(exported):
    report = verify(exported, training=Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, INT4)))
    assert report.ok, str(report)
    total = sum(s.size for s in SPECS.values())
    assert f"{total:,} weights compared with the training forward, 0 differ" in str(report)
    assert "byte for byte" in str(report)


@pytest.mark.parametrize(
    "quant, amount, sentence",
    [
        (PLAIN, 1.0, "rounded afterwards"),
        (INT4, 0.0, "rounded afterwards"),
        (INT4, 0.5, "rounded afterwards"),
        (replace(INT4, group_size=16), 1.0, "groups of 32, the training forward had groups of 16"),
    ],
)
def test_another_forward_than_that_of_training_is_no_proof(exported, quant, amount, sentence):
    """Which grid the run had, and whether it had begun, is the run's to say and not the files'."""
    report = verify(exported, training=Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, quant), amount))
    assert not report.ok and sentence in str(report) and ", 0 differ" not in str(report)


@pytest.mark.parametrize(
    "key, value, severity",
    [
        ("routed_scaling_factor", 2.5, "error"),
        ("rope_theta", 10000.0, "error"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, "error"),
        ("torch_dtype", "float32", "error"),
        ("eos_token_id", 5, "warning"),
        ("max_position_embeddings", 64, "warning"),
    ],
)
def test_another_network_than_that_of_training_is_found_without_evidence(exported, tmp_path, key, value, severity):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "evidence.json").unlink()
    training = Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, INT4), model=MODEL)
    assert verify(copy, training=training).ok
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    report = verify(copy, training=training)
    assert report.ok == (severity == "warning"), str(report)
    assert any(f"config.json: {key} was " in f.message and " in training and is " in f.message for f in report.of(severity))


def test_another_spelling_of_the_network_is_no_difference(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "evidence.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}, "model_type": "kimi_k2"}
    (copy / "config.json").write_text(json.dumps(config | rope))
    report = verify(copy, training=Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, INT4), model=MODEL))
    assert report.ok and "in training and is" not in str(report), str(report)


def test_masters_in_bf16_are_not_what_a_forward_on_the_grid_used(tmp_path):
    export_model(InMemory(WEIGHTS), SPECS, MODEL, PLAIN, tmp_path / "bf16")
    report = verify(tmp_path / "bf16", training=Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, INT4)))
    assert not report.ok and "had them on INT4" in str(report)


def test_the_card_says_whether_training_saw_the_weights(exported, tmp_path):
    export_model(InMemory(WEIGHTS), SPECS, MODEL, INT4, tmp_path / "out", rounded=True)
    assert "rounded afterwards" in (tmp_path / "out" / "README.md").read_text()
    assert "quantisation-aware training" in (exported / "README.md").read_text()


def test_the_safetensors_library_reads_what_the_forward_used(exported):
    """Independent of verify: the library's reader, and shifts instead of quant/pack.py."""
    tensors = read_all(exported)
    serving = Serving.of(MODEL, INT4)
    forward = jax.jit(lambda w: as_served(w, SPECS["moe.mlp.experts_gate_up"], serving, jnp.float32(1)))
    served = np.asarray(forward(WEIGHTS["moe.mlp.experts_gate_up"]))
    for layer in (0, 1):
        for expert in range(4):
            for half, name in enumerate(("gate", "up")):
                stem = f"model.layers.{layer + 1}.mlp.experts.{expert}.{name}_proj."
                words = tensors[stem + "weight_packed"].view(np.uint32)
                codes = ((words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).reshape(32, 64).astype(np.float32) - 8
                scales = tensors[stem + "weight_scale"].astype(np.float32).repeat(32, 1)
                values = (codes * scales).astype(ml_dtypes.bfloat16).astype(np.float32)
                assert (values != served[layer, expert, :, half].T).sum() == 0
                assert tensors[stem + "weight_shape"].tolist() == [32, 64]


def test_index_names_every_tensor_and_sums_bytes(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    tensors = read_all(exported)
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_router_bias_stays_float32(exported):
    tensors = read_all(exported)
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(bias, WEIGHTS["moe.mlp.router_bias"][0])
    assert bias.dtype == np.float32
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == ml_dtypes.bfloat16


def test_config_says_what_four_readers_need(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["scoring_func"] == "sigmoid"
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_plain_export(tmp_path):
    summary = export_model(InMemory(WEIGHTS), SPECS, MODEL, PLAIN, tmp_path / "bf16")
    assert summary.quantized_weights == 0
    tensors = read_all(tmp_path / "bf16")
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.experts.0.down_proj.weight"],
        WEIGHTS["moe.mlp.experts_down"][0, 0].T.astype(ml_dtypes.bfloat16),
    )
    report = verify(tmp_path / "bf16", training=Training(InMemory(WEIGHTS), SPECS, Serving.of(MODEL, PLAIN)))
    assert report.ok, str(report)


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        export_model(InMemory(WEIGHTS), SPECS, MODEL, INT4, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_a_failed_export_leaves_nothing(tmp_path):
    class Broken(InMemory):
        def read(self, path, index):
            if path == "final_norm":
                raise OSError("disk")
            return super().read(path, index)

    with pytest.raises(OSError):
        export_model(Broken(WEIGHTS), SPECS, MODEL, INT4, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masters", [np.float32, ml_dtypes.bfloat16])
def test_every_pair_of_master_and_served_dtype_is_proven(tmp_path, dtype, masters):
    model = replace(MODEL, dtype=dtype)
    weights = InMemory({path: jnp.asarray(w.astype(masters)) for path, w in WEIGHTS.items()})
    export_model(weights, SPECS, model, INT4, tmp_path / "out")
    report = verify(tmp_path / "out", training=Training(weights, SPECS, Serving.of(model, INT4)))
    assert report.ok and ", 0 differ" in str(report), str(report)
