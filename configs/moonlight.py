"""Moonlight-16B-A3B (arXiv 2502.16982): the first large model trained with Muon."""

from __future__ import annotations

from configs.schema import ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig


def moonlight_16b() -> RunConfig:
    """Moonlight with its three-stage schedule over 5.7 T tokens; the batch, 2048 at first, is its later 4096."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=163840,
            hidden_size=2048,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=11264,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            max_position_embeddings=8192,
            bos_token_id=163584,
            eos_token_id=163586,
            pad_token_id=163839,
        ),
        optim=OptimConfig(
            lr=4.2e-4,
            schedule="moonlight",
            warmup_steps=2000,
            decay_fraction=0.5 / 5.7,
            qk_clip_tau=None,
            router_bias_rule="centred",
        ),
        quant=QuantConfig(grid="none"),
        train=TrainConfig(steps=170_000, batch_size=4096, seq_len=8192, remat="names", balance_loss=1e-3),
    )
