"""DeepSeek-V3 (arXiv 2412.19437), main model without its multi-token-prediction module."""

from __future__ import annotations

from configs.schema import ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3 with its AdamW recipe; the batch ramp and the two short last stages of the schedule are left out."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=129280,
            hidden_size=7168,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            n_group=8,
            topk_group=4,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            yarn_factor=40.0,
            yarn_beta_fast=32.0,
            max_position_embeddings=163840,
            initializer_range=0.006,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        optim=OptimConfig(
            matrices="adamw",
            lr=2.2e-4,
            schedule="wsd",
            warmup_steps=2000,
            decay_fraction=4.8 / 14.8,
            clip="all",
            qk_clip_tau=None,
            router_bias_rule="sign",
        ),
        quant=QuantConfig(grid="none"),
        train=TrainConfig(steps=235_000, batch_size=15360, seq_len=4096, remat="names", balance_loss=1e-4),
    )
