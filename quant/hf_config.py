"""Writes config.json: the words of Hugging Face's `deepseek_v3`, and the compressed-tensors section beside them.

Written for four readers at once. transformers takes `scoring_func` for granted, llama.cpp takes softmax when it is
missing; SGLang reads `format` from the top level only and looks its scheme up under the target "Linear". Kimi's own
`kimi_k2` type is not written: transformers loads such a directory with randomly initialised experts and a warning.
"""

from __future__ import annotations

from typing import Any

from configs.schema import ModelConfig, QuantConfig

SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Fields that ModelConfig and config.json spell alike."""

ROPE_SCALING = {
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_positions",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
"""Keys of `rope_scaling` and our fields."""

FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
"""What the family's mathematics takes for granted; a file that says otherwise is another architecture."""

HARMLESS = {
    "attention_dropout": 0.0,
    "use_cache": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "ep_size": 1,
    "seq_aux": True,
    "aux_loss_alpha": 0.0,
}
"""Written because older readers ask for them; they do not change a forward pass."""

IGNORED_MODULES = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
"""Linear modules that stay in bf16, as Kimi-K2-Thinking lists them; the last pattern is the dense layer's."""


def quantization_config(group_size: int) -> dict[str, Any]:
    """The compressed-tensors section for symmetric INT4 groups along the inputs."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": IGNORED_MODULES,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def stops(model: ModelConfig) -> int | list[int]:
    """eos_token_id as Hugging Face has it: one id, or a list."""
    return [model.eos_token_id, *model.stop_token_ids] if model.stop_token_ids else model.eos_token_id


def write_config(model: ModelConfig, quant: QuantConfig) -> dict[str, Any]:
    """The content of config.json for a model and the grid of its routed experts."""
    config: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    config |= {name: getattr(model, name) for name in SAME_NAME} | {"eos_token_id": stops(model)}
    config |= {"num_key_value_heads": model.num_attention_heads, "torch_dtype": model.dtype}
    config |= FIXED | HARMLESS
    config["rope_scaling"] = None
    if model.yarn_factor != 1.0:
        config["rope_scaling"] = {"type": "yarn"} | {key: getattr(model, ours) for key, ours in ROPE_SCALING.items()}
    if quant.grid != "none":
        config["quantization_config"] = quantization_config(quant.group_size)
    return dict(sorted(config.items()))


def generation_config(model: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": stops(model),
        "pad_token_id": model.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "max_length": model.max_position_embeddings,
    }
