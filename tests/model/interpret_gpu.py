"""Our attention kernels in Pallas' GPU interpreter, on a CPU: warpgroups are threads, barriers block, copies are copies."""

from contextlib import contextmanager

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.hopper import plgpu
from model.kernels import attention_gpu

PRESENT = hasattr(plgpu, "InterpretGPUParams")


@contextmanager
def interpreted(monkeypatch):
    """Attention traced inside runs interpreted, and data races are reported.

    The interpreter multiplies only what lies in shared memory. So each warpgroup gets room of its own, where `multiply`
    puts what it has in registers; all else is what a device runs.
    """
    room = []

    def call(body, outputs, scratch, *rest):
        def run(*refs):
            *refs, mine = refs
            room.append(mine)
            body(*refs)
            room.pop()
        return real_call(run, outputs, (*scratch, plgpu.SMEM((attention_gpu.GROUPS, 64, 128), jnp.bfloat16)), *rest)

    def multiply(total, x, tile, transposed=False):
        if not hasattr(x, "ref"):  # a value, not a place in memory
            mine = room[-1].at[lax.axis_index("group"), pl.ds(0, x.shape[0]), pl.ds(0, x.shape[1])]
            mine[...] = x
            x = mine
        real_multiply(total, x, tile, transposed)
        plgpu.wgmma_wait(0)

    real_call, real_multiply = attention_gpu._call, attention_gpu.multiply
    monkeypatch.setattr(attention_gpu, "_call", call)
    monkeypatch.setattr(attention_gpu, "multiply", multiply)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(num_cores_or_threads=3, detect_races=True)):
        yield
