"""Attention compiled, down to the GPU's own instructions, for a Hopper GPU that is not here. Needs the extra plan-gpu."""

import dataclasses
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import pytest

from configs.presets import preset
from configs.schema import MeshConfig
from model import attention
from model.kernels.attention_gpu import gradients
from model.kernels.intervals import Intervals
from tests.plan.test_kernels_compile import BF16, array, compiled, kernels
from train.plan import aot, compiler
from train.plan.aot import compile_step
from train.plan.roofline import STATED
from train.plan.topology import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu"),
]


@pytest.mark.parametrize("d, v", [(192, 128), (128, 128), (64, 64)])
def test_attention(d, v):
    """Forward and backward are three kernels, which state their FLOPs, and nothing of the size of the logits is left."""
    B, S, H = 1, 4096, 2

    def loss(q, k, v, segments):
        out, top = attention.causal(q, k, v, segments, jnp.arange(S), 0.1, "hopper")
        return jnp.sum(out.astype(jnp.float32)), top

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = compiled(
            "h200-1",
            jax.grad(loss, argnums=(0, 1, 2), has_aux=True),
            *[array((B, S, H, d), BF16)] * 2,
            array((B, S, H, v), BF16),
            array((B, S), jnp.int32),
        )
    pairs = B * H * S * S  # of a query and a key, half of which see each other; two FLOPs each
    assert sorted(kernels(program)) == sorted(pairs * n for n in (d + v, 2 * d + v, 2 * d + 2 * v))
    # output, its gradient, and a few numbers per row
    assert program.memory_analysis().temp_size_in_bytes < 3 * B * S * H * v * 2 + 64 * B * S * H


def test_backward_kernels_keep_their_registers(tmp_path, monkeypatch):
    """The assembler spills none and lets products overlap. Where it ignores setmaxnreg, as nvJitLink does, it does neither
    (docs/performance.md)."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    B, S, H, d, v = 1, 512, 2, 192, 128
    per_row = array((B, H, S), jnp.float32)

    def backward(q, k, v, g, lse, delta, segments):
        seen = Intervals.of(segments, jnp.arange(S), S, S)
        return gradients.backward(q, k, v, g, lse, delta, seen, d**-0.5)

    values = array((B, S, H, v), BF16)
    compiled("h200-1", backward, *[array((B, S, H, d), BF16)] * 2, values, values, per_row, per_row, array((B, S), jnp.int32))
    accounts = [file.read_text() for file in tmp_path.glob("*.ptxas")]
    assert len(accounts) == 2
    for account in accounts:
        assert " 0 bytes spill stores" in account
        assert "setmaxnreg" not in account and "serialized" not in account


def test_in_the_train_step():
    """A step of a small K2-shaped model: attention is kernels in every layer, and is not repeated under remat names. They are
    told from those of the experts by the FLOPs that they state."""
    cfg = preset("tiny")
    model = dataclasses.replace(
        cfg.model,
        num_hidden_layers=3,
        hidden_size=256,
        moe_intermediate_size=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    cfg = dataclasses.replace(
        cfg,
        model=model,
        mesh=MeshConfig(data=1),
        train=dataclasses.replace(cfg.train, batch_size=2, seq_len=512, accumulate=1, remat="names", layers="scan"),
    )
    program = compile_step(cfg, topology("h200-1")).program
    d, v, pairs = model.qk_head_dim, model.v_head_dim, 2 * model.num_attention_heads * 512 * 512
    stated = [
        int(STATED.search(i.op_name).group(1))
        for scope in program.computations.values()
        for i in scope.values()
        if i.kind == "custom-call" and "mosaic_gpu" in i.rest and STATED.search(i.op_name)
    ]
    calls = [flops for flops in stated if flops in {pairs * n for n in (d + v, 2 * d + v, 2 * d + 2 * v)}]
    assert len(calls) == 3 * (1 + 1), "the dense layer's and the scanned layers'"
    assert len(set(calls)) == 3


def test_memory_is_known_before_there_is_code(monkeypatch):
    """XLA's report for GPUs counts what the step is given; without it the total is what the program itself says of its own."""
    monkeypatch.setattr(compiler, "SETTLED", 1e9)  # wait for the code
    whole = compile_step(preset("tiny"), topology("h200-1"))
    real = aot.compile_apart
    monkeypatch.setattr(aot, "compile_apart", lambda *a: dataclasses.replace(real(*a), has_code=False, temp=0))
    early = compile_step(preset("tiny"), topology("h200-1"))
    assert whole.has_code and not early.has_code
    assert early.memory.peak == pytest.approx(whole.memory.peak, rel=1e-3)
