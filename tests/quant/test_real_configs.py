"""Published configurations, and the two tables of tensor names: ours, and the one verify derives alone."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.presets import PRESETS, preset
from configs.schema import ConfigError, QuantConfig
from model.transformer import param_specs
from quant.export import export_model, tensor_table
from quant.family import Family, expected_tensors
from quant.hf_config import write_config
from quant.importer import Imported
from quant.layout import all_slots
from quant.read_config import read_config
from quant.source import InMemory
from tests.quant.small_model import INT4, MODEL, random_weights, specs_of

K2_THINKING = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 163840,
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
}


def written(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_kimi_k2_thinking_is_read_as_the_preset_says(tmp_path):
    config = read_config(written(tmp_path, K2_THINKING))
    assert config.model == preset("kimi_k2_thinking").model
    assert config.quant == QuantConfig() and config.prefix == "" and config.notes == ()


def test_deepseek_v3_in_fp8_is_refused_and_its_extra_layer_noted(tmp_path):
    config = write_config(preset("deepseek_v3").model, QuantConfig(grid="none")) | {"num_nextn_predict_layers": 1}
    config.pop("pad_token_id")
    read = read_config(written(tmp_path, config))
    assert "1 multi-token-prediction layers are skipped" in read.notes[0]
    assert read.model.n_group == 8
    with pytest.raises(ConfigError, match="fp8"):
        read_config(written(tmp_path, config | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}))


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_writing_and_reading(tmp_path, name):
    cfg = preset(name)
    read = read_config(written(tmp_path, write_config(cfg.model, cfg.quant)))
    assert read.model == cfg.model and (read.quant.grid, read.quant.group_size) == (cfg.quant.grid, 32)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("kimi_k2_thinking", "deepseek_v3")])
def test_both_tables_of_tensors_agree(name):
    """Up to Kimi K2's 70,000 tensors; the two left out have the same layers."""
    model = preset(name).model
    ours = {slot.name: slot.shape for slot in all_slots(param_specs(model))}
    assert ours == expected_tensors(Family.of(write_config(model, INT4)))


def test_kimi_k2_projections_have_the_published_shapes():
    model = preset("kimi_k2_thinking").model
    specs = {path: spec for path, spec in param_specs(model).items() if spec.on_grid}
    one_layer = {p: replace(s, shape=(1, *s.shape[1:]), layers=(1,)) for p, s in specs.items()}
    table = {}
    for slot in all_slots(one_layer):
        table |= tensor_table(slot, model, INT4)
    stem = "model.layers.1.mlp.experts.383"
    assert [table[f"{stem}.gate_proj.{p}"][1] for p in ("weight_packed", "weight_scale")] == [(2048, 896), (2048, 224)]
    assert [table[f"{stem}.down_proj.{p}"][1] for p in ("weight_packed", "weight_scale")] == [(7168, 256), (7168, 64)]


def test_import_goes_straight_into_a_sharding(tmp_path):
    specs = specs_of(MODEL)
    weights = random_weights(specs)
    export_model(InMemory(weights), specs, MODEL, INT4, tmp_path / "int4")
    source, path = Imported(tmp_path / "int4", specs, trained_groups=32), "moe.mlp.experts_gate_up"
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp"))
    array = jax.make_array_from_callback(specs[path].shape, sharding, lambda index: source.region(path, index))
    assert array.addressable_shards[0].data.shape == (2, 1, 32, 2, 32)
    np.testing.assert_array_equal(array, source.region(path))
