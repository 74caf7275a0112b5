"""A small member of the family and random weights for it: the ParamSpec table is the one that ships."""

from __future__ import annotations

import numpy as np

from configs.param_spec import ParamSpec
from configs.schema import ModelConfig, QuantConfig
from model.transformer import param_specs as specs_of

__all__ = ["INT4", "MODEL", "PLAIN", "random_weights", "specs_of"]

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    bos_token_id=60,
    eos_token_id=61,
    pad_token_id=62,
)
INT4 = QuantConfig()
PLAIN = QuantConfig(grid="none")


def random_weights(specs: dict[str, ParamSpec], seed: int = 0, scale: float = 0.02) -> dict[str, np.ndarray]:
    """float32 masters; norms near one."""
    rng = np.random.default_rng(seed)
    return {
        path: (rng.normal(1.0, 0.1, spec.shape) if path.endswith("norm") else rng.normal(0, scale, spec.shape)).astype(np.float32)
        for path, spec in specs.items()
    }
