"""Runs of published models on named machines: a preset, its mesh, its microbatches and what it keeps in which precision.

`launch.py plan --preset NAME` compiles each for its machine (docs/plan.md); `launch.py train --preset NAME` is the run.
"""

from __future__ import annotations

from dataclasses import replace

from configs.deepseek_v3 import deepseek_v3
from configs.kimi_k2 import kimi_k2, kimi_k2_thinking
from configs.moonlight import moonlight_16b
from configs.schema import MeshConfig, QuantConfig, RunConfig

MACHINES = {
    "moonlight_16b_h200_1": "h200:1x1",
    "moonlight_16b_v6e_16": "v6e:4x4",
    "kimi_k2_v5p_512": "v5p:8x8x8",
    "kimi_k2_tpu7x_256": "tpu7x:4x8x8",
    "kimi_k2_thinking_256k": "v5p:8x8x16",
    "deepseek_v3_h100_512": "h100:64x8",
}
"""The machine each run is planned for."""


def moonlight_16b_h200_1() -> RunConfig:
    """Post-training of all 16 B parameters on one GPU: Muon, experts on the INT4 grid, QK-Clip. 6 bytes per parameter:
    weights, momentum and the gradients' sum in bf16, of which there is one copy each. Half a million tokens a step, four rows
    at a time: as many as leave a tenth of the memory free, because every microbatch reads all weights."""
    base = moonlight_16b()
    return replace(
        base,
        quant=QuantConfig(grid="int4"),
        mesh=MeshConfig(data=1),
        optim=replace(
            base.optim,
            lr=2e-5,
            schedule="wsd",
            warmup_steps=50,
            decay_fraction=0.3,
            qk_clip_tau=100.0,
            momentum_dtype="bfloat16",
            master_dtype="bfloat16",
        ),
        train=replace(base.train, steps=1000, batch_size=64, accumulate=16),
    )


def moonlight_16b_v6e_16() -> RunConfig:
    """31 GiB a chip: momentum in bf16, two rows of 8192 a microbatch. Experts over two neighbours only: tokens cost wires
    for every one of them, weights once a microbatch."""
    base = moonlight_16b()
    return replace(
        base,
        optim=replace(base.optim, momentum_dtype="bfloat16", qk_clip_tau=100.0),
        quant=QuantConfig(grid="int4"),
        mesh=MeshConfig(data=1, fsdp=8, expert=2),
        train=replace(base.train, accumulate=128),
    )


def kimi_k2_v5p_512() -> RunConfig:
    """The published 67 M tokens a step, experts on the grid from the first one; 16 devices share the experts of a layer, 32
    their storage. Attention over 4096 positions is cheap to compute again, its outputs would take 15 GiB."""
    base = kimi_k2()
    return replace(
        base,
        optim=replace(base.optim, momentum_dtype="bfloat16"),
        quant=QuantConfig(grid="int4"),
        mesh=MeshConfig(data=1, fsdp=32, expert=16),
        train=replace(base.train, accumulate=8, remat="layer"),
    )


def kimi_k2_tpu7x_256() -> RunConfig:
    """256 chips are 512 devices of 94.7 GiB. They multiply 2.5 times as fast as a v5p over the same wires, so fewer of them share
    a layer's experts: tokens cost wires for every one of them, weights once a microbatch."""
    return replace(kimi_k2_v5p_512(), mesh=MeshConfig(data=1, fsdp=64, expert=8))


def kimi_k2_thinking_256k() -> RunConfig:
    """256 rows of 256K: 32 devices share a row."""
    base = kimi_k2_thinking()
    return replace(
        base,
        optim=replace(base.optim, momentum_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=4, expert=8, context=32),
        train=replace(base.train, accumulate=8),
    )


def deepseek_v3_h100_512() -> RunConfig:
    """Muon and QK-Clip where the paper had AdamW. Experts over the eight GPUs of a node, storage over all: weights cross the
    network, tokens do not. Six rows a microbatch, and attention computed again, so that weights come seldom."""
    base = deepseek_v3()
    return replace(
        base,
        quant=QuantConfig(grid="int4"),
        optim=replace(base.optim, matrices="muon", clip="adamw", qk_clip_tau=100.0, momentum_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=64, expert=8),
        train=replace(base.train, accumulate=5, remat="layer"),
    )


PLANS = {
    f.__name__: f
    for f in (
        moonlight_16b_h200_1,
        moonlight_16b_v6e_16,
        kimi_k2_v5p_512,
        kimi_k2_tpu7x_256,
        kimi_k2_thinking_256k,
        deepseek_v3_h100_512,
    )
}
