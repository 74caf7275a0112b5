"""Our kernels for Hopper GPUs in Pallas' GPU interpreter, on a CPU: warpgroups are threads, barriers block, copies are
copies, data races are errors."""

import inspect
from contextlib import contextmanager
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.hopper import plgpu
from model.kernels.attention_gpu import frame

ROOM = 4
"""Axes of the buffer that stands in for registers; others have fewer."""

PRESENT = hasattr(plgpu, "InterpretGPUParams") and jax.__version_info__ >= (0, 12)
"""jax 0.11 has an earlier interpreter, which wants every phase of a barrier seen by everybody and misses races that we plant."""


@contextmanager
def interpreted(monkeypatch, **settings):
    """Kernels traced inside run interpreted. The interpreter's race detector leaves out what WGMMA reads, so it is told here;
    it is told at once, where a GPU may read until the product is waited for. That, tests/plan/ptx knows."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as inside

    @inside.fail_on_exception
    def multiply(**call):
        memory, thread = inside._get_shared_memory(), call["thread"]
        for operand in "ab":
            key = inside.HostAllocationKey.from_array(call[f"{operand}_allocation_key_as_array"])
            with memory.lock:
                memory.clocks[thread].inc(memory.thread_to_vc_position(thread))
                clock = memory.clocks[thread].copy()
            from_registers = len(memory.buffer_shape_and_dtype(key).shape) == ROOM
            inside.get_races().check_read(
                thread,
                (clock.generic_clock if from_registers else clock.async_smem_clock).copy(),
                key,
                memory.access(key, jax.tree.map(int, inside._remove_noop_transforms(call[f"{operand}_transforms"]))),
                source_info=call["source_info"],
            )
        return real(**call)

    real = inside.wgmma
    with (
        monkeypatch.context() as patch,
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(num_cores_or_threads=3, detect_races=True, **settings)),
    ):
        patch.setattr(inside, "wgmma", multiply)
        yield


@contextmanager
def interpreted_attention(monkeypatch):
    """The same for attention. The interpreter multiplies only what lies in shared memory. So each warpgroup gets room of its
    own, where `multiply` puts what it has in registers; all else is what a device runs."""
    room = []

    def call(body, outputs, scratch, *rest):
        def run(*refs):
            *refs, mine = refs
            room.append(mine)
            body(*refs)
            room.pop()

        return real_call(run, outputs, (*scratch, plgpu.SMEM((frame.GROUPS, 1, 64, 128), jnp.bfloat16)), *rest)

    def multiply(total, x, tile, transposed=False):
        if not hasattr(x, "ref"):  # a value, not a place in memory
            mine = room[-1].at[lax.axis_index("group"), 0, pl.ds(0, x.shape[0]), pl.ds(0, x.shape[1])]
            mine[...] = x
            x = mine
        real_multiply(total, x, tile, transposed)
        plgpu.wgmma_wait(0)

    real_call, real_multiply = frame.call, frame.multiply
    with monkeypatch.context() as patch, interpreted(monkeypatch):
        patch.setattr(frame, "call", call)
        patch.setattr(frame, "multiply", multiply)
        yield


def sabotaged(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A copy of the module with pieces of its text, each there once, replaced: what a test must notice."""
    text = inspect.getsource(module)
    for piece, other in changes:
        assert text.count(piece) == 1, piece
        text = text.replace(piece, other)
    copy = ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    exec(compile(text, module.__file__, "exec"), copy.__dict__)
    return copy
