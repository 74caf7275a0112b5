"""Kimi K2 (arXiv 2507.20534): the 1.03 T base recipe, and K2-Thinking's 256K context with INT4 experts.

Released configs of the family disagree on rms_norm_eps, YaRN's beta_fast and the end token; an imported checkpoint
brings its own values.
"""

from __future__ import annotations

from dataclasses import replace

from configs.schema import ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig


def kimi_k2() -> RunConfig:
    """K2: Muon with QK-Clip, 500 steps of warm-up, 2e-4 for 10 T tokens, cosine to 2e-5 over the last 5.5 T."""
    model = ModelConfig(
        vocab_size=163840,
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=1,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=384,
        num_experts_per_tok=8,
        n_shared_experts=1,
        routed_scaling_factor=2.827,
        rms_norm_eps=1e-6,
        rope_theta=50000.0,
        yarn_factor=32.0,
        yarn_beta_fast=1.0,
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_id=163585,
        stop_token_ids=(163586,),
        pad_token_id=163839,
    )
    return RunConfig(
        model=model,
        optim=OptimConfig(lr=2e-4, schedule="wsd", warmup_steps=500, decay_fraction=5.5 / 15.5, qk_clip_tau=100.0),
        quant=QuantConfig(grid="none"),
        # 16384 rows of 4096 are the 67 M tokens of a published step; the steps are 15.5 T tokens of them.
        train=TrainConfig(steps=231_000, batch_size=16384, seq_len=4096, remat="names", balance_loss=1e-3),
    )


def kimi_k2_thinking() -> RunConfig:
    """K2-Thinking: 256K positions, routed experts on the INT4 grid from the first step. Its post-training schedule is
    not published; learning rate, batch and steps are ours."""
    base = kimi_k2()
    return replace(
        base,
        model=replace(
            base.model,
            yarn_factor=64.0,
            max_position_embeddings=262144,
            rms_norm_eps=1e-5,
            eos_token_id=163586,
            stop_token_ids=(),
        ),
        optim=replace(base.optim, lr=2e-5, schedule="cosine", warmup_steps=50),
        quant=QuantConfig(grid="int4"),
        train=replace(base.train, steps=1000, batch_size=256, seq_len=262144, checkpoint_every=100),
    )
