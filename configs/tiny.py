"""Small members of K2's family: same blocks, same gate-scale rule, widths that every serving engine accepts.

Engines want hidden_size and moe_intermediate_size in multiples of 128, a query latent, rms_norm_eps 1e-6 and, where
YaRN is used, beta_fast 32. `routed_scaling_factor` is model/router.py:gate_scale of the two expert counts.
"""

from __future__ import annotations

import dataclasses

from configs.schema import DataConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig


def tiny() -> RunConfig:
    """2.1 M parameters: learns the built-in chain task on two CPU cores in minutes. Three quarters of its steps are bf16,
    the rest on the grid, as in K2 Thinking's post-training. A short rope_theta: its contexts are short."""
    return RunConfig(
        model=ModelConfig(num_hidden_layers=3, num_experts_per_tok=2, routed_scaling_factor=1.412, rope_theta=1000.0),
        optim=OptimConfig(lr=5e-3),
        quant=QuantConfig(start_step=338),
        data=DataConfig(task_length=(1, 6)),
        train=TrainConfig(steps=450, batch_size=24, seq_len=96, log_every=25, checkpoint_every=150, layers="unroll"),
    )


def tiny_sft() -> RunConfig:
    """Supervised fine-tuning of a `tiny` run, whose weights it starts from (train.init_from), on conversations with tools:
    the built-in pointer_chase, or chat rows named by data.paths. Longer ones leave out their oldest tool exchanges, as the
    live loop does. As in K2 Thinking's post-training the experts go onto the grid during it."""
    base = tiny()
    return dataclasses.replace(
        base,
        optim=OptimConfig(lr=3e-3, warmup_steps=10),
        quant=QuantConfig(start_step=80),
        data=DataConfig(task="pointer_chase", task_length=(1, 8), too_long="shorten"),
        train=dataclasses.replace(base.train, steps=120, batch_size=6, seq_len=768, checkpoint_every=40, init_from="runs/tiny"),
    )


def laptop() -> RunConfig:
    """25 M parameters, 6 M active: an evening on a laptop."""
    return RunConfig(
        model=ModelConfig(
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=1024,
            moe_intermediate_size=128,
            n_routed_experts=32,
            num_experts_per_tok=4,
            routed_scaling_factor=1.996,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        train=TrainConfig(steps=2000, batch_size=32, seq_len=512),
    )


def one_gpu() -> RunConfig:
    """2.7 B parameters, 0.7 B active: fills one 80 GB accelerator. The vocabulary has room for any tokenizer of up to
    65,536 ids."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=65536,
            hidden_size=2048,
            num_hidden_layers=12,
            num_attention_heads=16,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=8192,
            moe_intermediate_size=512,
            n_routed_experts=64,
            num_experts_per_tok=6,
            routed_scaling_factor=2.446,
        ),
        optim=OptimConfig(lr=4e-4, warmup_steps=500),
        train=TrainConfig(steps=20_000, batch_size=64, seq_len=4096, accumulate=8, remat="hidden", balance_loss=1e-3),
    )
