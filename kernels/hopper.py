"""The frame of our kernels for Hopper GPUs, and the one file that touches Pallas' experimental Mosaic GPU interface.

A product is a list of output tiles. Every core runs one block of three warpgroups for the whole kernel: one fetches
operands (TMA) into a ring of buffers, two multiply what has arrived (WGMMA, a part of the tile each) and store the result.
The ring runs on from tile to tile, so the next tile's operands are on their way while this one is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.backend import get_default_device
from jaxtyping import Array

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except (ImportError, AttributeError):  # another jax, or one without its GPU part: the registries then choose other entries
    plgpu = None

try:
    from jax._src.lib import cuda_versions
except ImportError:
    cuda_versions = None

CORES = 132
"""Of an H100 SXM, H200 and GH200. Others of the family have 114 or 78."""

SHARED_BYTES = 232448
"""What one block may have of a core's shared memory."""

FETCHING, WORKERS = 2, 2
"""Number of the warpgroup that fetches; 0 and 1 multiply. Of the 512 registers per lane of a core it needs few, and an
accumulator of 64 x 256 takes 128 of a worker's."""

MOST_STAGES = 6


def cores_here() -> int:
    """Of the GPU that a program is compiled for, one block each: were there more blocks, the last would wait for the first to
    end, and take as long again."""
    device = get_default_device()
    return getattr(device, "core_count", CORES) if device.platform == "gpu" else CORES


def miscompiles() -> bool:
    """Whether the assembler miscompiles the causal masks of jax's own attention kernel, which jax therefore refuses: CUDA 12.8.0
    to 12.9.0. (Whether ours come out wrong too was not tried.) The runtime's number has no patch level; the package has."""
    if not cuda_versions or cuda_versions.cuda_runtime_get_version() not in (12080, 12090):
        return False
    try:
        return tuple(map(int, version("nvidia-cuda-nvcc-cu12").split(".")[:3])) < (12, 9, 86)
    except PackageNotFoundError:
        return True


@dataclass(frozen=True)
class Tiles:
    """The tiles of one product, and what each needs. Callables run inside the kernel; `at` is what `place` returned.

    count     of output tiles
    boxes     shape of one step's part of each operand
    part      rows (64: what a WGMMA has) and columns of the accumulator of one worker
    place     (tile, *tables) -> (at, steps of the contraction); with 0 steps the tile is zero and nothing is fetched
    source    (at, step) -> an index into each operand
    multiply  (accumulator, worker, *buffers): adds one step's product
    target    (at, worker) -> index of the part in the output, the last two its first row and column
    mirrored  whether the output is symmetric: of each part only squares on and under the diagonal are stored, and those
              under it a second time, transposed, above it
    """

    count: int
    boxes: tuple[tuple[int, int], ...]
    part: tuple[int, int]
    place: Callable[..., tuple[Any, Array]]
    source: Callable[..., tuple]
    multiply: Callable[..., None]
    target: Callable[..., tuple]
    mirrored: bool = False


def transpose(ref):
    """A two-dimensional reference with its axes swapped; jax 0.10 has another name for it."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def run(
    tiles: Tiles,
    tables: tuple[Array, ...],
    operands: tuple[Array, ...],
    out: jax.ShapeDtypeStruct,
    *,
    name: str,
    flops: int,
    moved: int,
    cores: int | None = None,
) -> Array:
    """The kernel on `operands` (16-bit floats, last axes multiples of 64) with int32 `tables` in global memory. Reading
    past an operand gives zeros and writing past the output does nothing, but not by columns where it has only 64 of 16 bits
    (32 of 32): jax drops an axis of a single tile from the copy, index and all, and the part past the edge lands inside.
    name: what a trace shows. flops, bytes moved: see `stated`. cores: blocks; those of the GPU unless a test wants fewer."""
    cores = cores or cores_here()
    dtype = operands[0].dtype
    chunk = 128 // out.dtype.itemsize
    ring = sum(rows * columns for rows, columns in tiles.boxes) * dtype.itemsize
    staging = WORKERS * 2 * tiles.part[0] * 128
    stages = min((SHARED_BYTES - staging - 1024) // ring, MOST_STAGES)

    def kernel(*refs, buffers, staged, full, empty):
        given, target = refs[:-1], refs[-1]
        scalars, arrays = given[: len(tables)], given[len(tables) :]
        core, warpgroup = lax.axis_index("core"), lax.axis_index("warpgroup")
        mine = lax.div(tiles.count - core + cores - 1, cores)

        def place(number):
            return tiles.place(core + number * cores, *scalars)

        def over_tiles(work):
            """work(number, at, steps, steps before) for every tile of this core; all steps together."""

            def one(number, before):
                at, steps = place(number)
                work(number, at, steps, before)
                return before + steps

            return lax.fori_loop(0, mine, one, jnp.int32(0))

        @pl.when(warpgroup == FETCHING)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(number, at, steps, before):
                @pl.loop(0, steps)
                def _(step):
                    slot = lax.rem(before + step, stages)

                    @pl.when(before + step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    for array, buffer, index in zip(arrays, buffers, tiles.source(at, step), strict=True):
                        plgpu.copy_gmem_to_smem(array.at[index], buffer.at[slot], full.at[slot])

            total = over_tiles(fetch)

            @pl.loop(jnp.maximum(total - stages, 0), total)  # no barrier is left half way
            def _(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < WORKERS)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def product(acc, steps, before):
                def release(step):
                    plgpu.barrier_arrive(empty.at[lax.rem(before + step, stages)])

                @pl.loop(0, steps)
                def _(step):
                    slot = lax.rem(before + step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    tiles.multiply(acc, warpgroup, *(buffer.at[slot] for buffer in buffers))
                    plgpu.wgmma_wait(1)  # this product may go on while the next one's operands are awaited

                    @pl.when(step > 0)
                    def _():
                        release(step - 1)

                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _():
                    release(steps - 1)

                return acc[...]

            def work(number, at, steps, before):
                result = pl.run_scoped(lambda acc: product(acc, steps, before), plgpu.ACC(tiles.part)).astype(out.dtype)
                *outer, row, column = tiles.target(at, warpgroup)
                chunks = tiles.part[1] // chunk

                def store(slot, row, column):
                    plgpu.copy_smem_to_gmem(
                        staged.at[warpgroup, slot], target.at[(*outer, pl.ds(row, tiles.part[0]), pl.ds(column, chunk))]
                    )

                for i in range(chunks):
                    piece, at_column = result[:, i * chunk : (i + 1) * chunk], column + i * chunk
                    if tiles.mirrored:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        staged[warpgroup, 0] = piece
                        transpose(staged.at[warpgroup, 1])[...] = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        pl.when(at_column <= row)(partial(store, 0, row, at_column))
                        pl.when(at_column < row)(partial(store, 1, at_column, row))
                    else:
                        slot = lax.rem(number * chunks + i, 2)
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but the other slot's
                        staged[warpgroup, slot] = piece
                        plgpu.commit_smem()
                        store(slot, row, at_column)

            over_tiles(work)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel.__name__ = name
    call = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(cores,),
        grid_names=("core",),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "buffers": [plgpu.SMEM((stages, *box), dtype, transforms=swizzled(dtype, box[1])) for box in tiles.boxes],
            "staged": plgpu.SMEM((WORKERS, 2, tiles.part[0], chunk), out.dtype, transforms=swizzled(out.dtype, chunk)),
            "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    with stated(flops, moved):
        return call(*tables, *operands)


def stated(flops: int, moved: int):
    """A scope that states what a kernel inside it costs, for launch.py plan (train/plan/roofline.py), which cannot look into
    it: pallas_call's cost_estimate does not reach the compiled program on GPUs in jax 0.10."""
    return jax.named_scope(f"flops_{flops}_bytes_{moved}")


def swizzled(dtype, columns: int) -> tuple:
    """How TMA and WGMMA want a buffer laid out: tiles of 8 rows, as wide as a swizzle reaches."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
