"""What bench/train_cpu.py trains on both sides: shapes, the batch, the product whose rate counts as the machine's limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from configs.presets import preset
from configs.schema import ModelConfig, RunConfig
from model.transformer import param_specs
from train.counts import train_flops_per_token

SHAPES = {
    "25M, 32 experts": (
        dict(
            vocab_size=512,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=1024,
            moe_intermediate_size=128,
            n_routed_experts=32,
            num_experts_per_tok=4,
            routed_scaling_factor=1.996,
        ),
        8,
        256,
    ),
    "tiny": (dict(num_hidden_layers=3, num_experts_per_tok=2, routed_scaling_factor=1.412), 24, 96),
}
"""Model fields, rows, tokens per row. The first is the shape on which other trainers were measured before."""

MATMUL = np.ones((2048, 256), np.float32), np.ones((256, 1024), np.float32)
"""The operands of one product."""


def step_flops(cfg: RunConfig) -> int:
    """Useful operations of a step, forward and backward."""
    tokens = cfg.train.batch_size * cfg.train.seq_len
    return tokens * train_flops_per_token(cfg.model, param_specs(cfg.model), cfg.train.seq_len)


def limit(cfg: RunConfig, product: Callable[[], Any]) -> Callable[[], float]:
    """As many products as are the operations of a step that are useful: what takes as long meets the same slow moments.
    `product`: one of MATMUL's operands, finished when it returns."""
    count = max(round(step_flops(cfg) / (2 * MATMUL[0].size * MATMUL[1].shape[1])), 1)

    def run() -> float:
        for _ in range(count):
            result = product()
        return float(result[0, 0])

    return run


def config(shape: str, dtype: str) -> RunConfig:
    """A run of everything ours does: Muon, INT4 on the grid, QK-Clip, router bias, balance loss."""
    fields, rows, width = SHAPES[shape]
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        model=ModelConfig(**fields),
        quant=dataclasses.replace(tiny.quant, start_step=0),
        train=dataclasses.replace(
            tiny.train, batch_size=rows, seq_len=width, compute_dtype=dtype, balance_loss=1e-3, layers="unroll"
        ),
    )


def random_batch(cfg: RunConfig) -> dict[str, np.ndarray]:
    """Unpadded rows of one document each."""
    shape = cfg.train.batch_size, cfg.train.seq_len
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
    }
