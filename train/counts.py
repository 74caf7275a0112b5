"""What a network costs, in closed form from its ParamSpec table: parameters, FLOPs, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from configs.param_spec import ParamSpec, Specs
from configs.schema import ModelConfig, OptimConfig, QuantConfig

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes per value."""


@dataclass(frozen=True)
class Parameters:
    """total                  stored values, router biases included
    active                 values one token's forward pass uses, both embeddings included
    active_without_embed   the same without the input embedding, which is looked up, not multiplied
    matmul                 values one token is multiplied with; the FLOP formula's count
    routed                 values of the routed experts, the part that lives on the grid
    """

    total: int
    active: int
    active_without_embed: int
    matmul: int
    routed: int


def _active(spec: ParamSpec, cfg: ModelConfig) -> int:
    """Of E routed experts a token uses K."""
    return spec.size * cfg.num_experts_per_tok // cfg.n_routed_experts if spec.on_grid else spec.size


def parameters(cfg: ModelConfig, specs: Specs) -> Parameters:
    """Counts of every kind; `specs` is `param_specs(cfg)`."""
    active = {path: _active(spec, cfg) for path, spec in specs.items()}
    return Parameters(
        total=sum(spec.size for spec in specs.values()),
        active=sum(active.values()),
        active_without_embed=sum(active.values()) - specs["embed"].size,
        matmul=sum(active[path] for path, spec in specs.items() if spec.matrix is not None),
        routed=sum(spec.size for spec in specs.values() if spec.on_grid),
    )


def train_flops_per_token(cfg: ModelConfig, specs: Specs, seq_len: int) -> int:
    """Floating-point operations of forward and backward pass per token of a full row, without recomputation.

    3 * (2 * matmul parameters + L * H * (nope + rope + v) * S): two operations per multiplied weight; causal attention
    counted at half of its square; the backward pass costs twice the forward. The one definition of our MFU.
    """
    attention = cfg.num_hidden_layers * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim) * seq_len
    return 3 * (2 * parameters(cfg, specs).matmul + attention)


def state_bytes(specs: Specs, optim: OptimConfig) -> dict[str, int]:
    """Bytes of the training state: masters, and the optimizer's moments (one of Muon, two of AdamW, none of a bias)."""
    muon = optim.matrices == "muon"
    moments = sum(
        spec.size
        * (
            0
            if spec.update == "router_bias"
            else WIDTH[optim.momentum_dtype]
            if spec.update == "muon" and muon
            else 2 * WIDTH["float32"]
        )
        for spec in specs.values()
    )
    masters = sum(spec.size * (4 if spec.update == "router_bias" else WIDTH[optim.master_dtype]) for spec in specs.values())
    return {"masters": masters, "moments": moments}


def served_bytes(cfg: ModelConfig, specs: Specs, quant: QuantConfig) -> int:
    """Bytes of the exported weights: 4-bit codes and one bf16 scale per group on the grid, the served dtype elsewhere."""
    total = 0
    for spec in specs.values():
        if spec.on_grid and quant.grid == "int4":
            total += spec.size // 2 + spec.size // quant.group_size * 2
        else:
            total += spec.size * WIDTH[spec.served or cfg.dtype]
    return total


def cache_bytes_per_token(cfg: ModelConfig, dtype: str) -> int:
    """Bytes a decoded token adds to the cache, all layers together (arXiv 2405.04434, section 2.1.2)."""
    return cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * WIDTH[dtype]
