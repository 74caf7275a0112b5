"""The PTX of our Hopper kernels, carried out in numpy: what they would write to memory, on a machine without a GPU.

`record` takes the code and the TMA descriptors that Mosaic makes for a compiled kernel, `run` carries out its blocks one
after another. Where a GPU is free to choose, `run` chooses at random, and on purpose badly:

- Warps take turns at random.
- A TMA load spoils its destination at once and delivers later, in any order; a thread's copy (cp.async) when it is waited for. A
  TMA store reads shared memory only when it is waited for. What is past the edge of an array is read as zero and not written.
- Products (WGMMA) read and add where they are issued, or only where they are waited for: the caller's choice.
- Shared memory exists twice, as threads and as the copy and matrix engines see it. What a thread writes reaches the second
  with its fence.proxy.async.

Descriptors of WGMMA, swizzles, stmatrix, mbarriers with their counts of bytes, named barriers and bulk groups are as PTX ISA
9.0 describes them. A deadlock, too many arrivals at a barrier, bytes that never came, a misaligned address and registers that
go to a product without wgmma.fence are a `Hazard`; what this file does not know is a NotImplementedError.

Not modelled: time, clusters, blocks at the same time (ours share nothing), what ptxas does with the code, approximate
exponentials and logarithms (here exact), and fences between an ordinary read and a copy that writes there next (the
interpreter's race detector knows those: tests/model/interpret_gpu.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.plan.ptx.code import parse
from tests.plan.ptx.machine import Block, Descriptor, Hazard

__all__ = ["Hazard", "Kernel", "record", "record_triton", "run"]


@dataclass(frozen=True)
class Kernel:
    """instructions  (operation, function of a warp), where branches' functions return the next instruction's number
    descriptors   in the order in which the kernel has them
    warps         of a block"""

    instructions: list[tuple[str, Callable]]
    descriptors: list[Descriptor]
    warps: int = 12


def record(monkeypatch, compiles: Callable[[], object], folder: Path, arguments: int) -> Kernel:
    """The one kernel that `compiles()` makes Mosaic compile, with so many arguments, results included."""
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import launch_context

    descriptors = []

    def transformed(kind, transforms):
        aside = ir.Module.create()
        with ir.InsertionPoint(aside.body):
            ref = ir.Operation.create("builtin.unrealized_conversion_cast", results=[kind]).result
            for transform in transforms:
                ref = transform.apply(ref)
        kind = ir.MemRefType(ref.type)
        return tuple(kind.shape), tuple(kind.get_strides_and_offset()[0])

    def describe(context, ref, transforms, peer, box, swizzle, *rest, **more):
        before = len(context.tma_descriptors)
        result = real(context, ref, transforms, peer, box, swizzle, *rest, **more)
        if len(context.tma_descriptors) > before:
            ref = launch_context._find_kernel_argument_for_gmem_ref(ref)
            number = ir.IntegerAttr(ref.owner.attributes["mosaic_gpu.from_kernel_arg_idx"]).value
            descriptors.append(Descriptor(number, *transformed(ref.type, transforms), tuple(box), int(swizzle or 16)))
        return result

    real = launch_context.LaunchContext._get_tma_desc
    with monkeypatch.context() as patch:
        patch.setattr(launch_context.LaunchContext, "_get_tma_desc", describe)
        patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        compiles()
    (path,) = folder.glob("*.ptx")
    plain = [n for n in range(arguments) if n not in {d.argument for d in descriptors}]
    return Kernel(parse(path.read_text(), plain), descriptors)


def record_triton(compiles: Callable[[dict], object], folder: Path, name: str, arguments: int) -> Kernel:
    """The kernel of this name in what `compiles(options)` makes Triton compile, with so many arguments, results included."""
    compiles({"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"})
    (text,) = (text for path in folder.glob("*.ptx") if f".entry {name}(" in (text := path.read_text()))
    return Kernel(parse(text, list(range(arguments))), [], int(re.search(r"\.reqntid (\d+)", text).group(1)) // 32)


def run(
    kernel: Kernel, arrays: list[np.ndarray], blocks: Iterable[tuple[int, int, int]], seed: int, late: bool
) -> list[np.ndarray]:
    """Carries out the kernel on its arguments, results among them, in place. How often each element was written. blocks: x, y,
    z of each; late: whether products are done where they are waited for."""
    chance, times = random.Random(seed), [np.zeros(array.shape, int) for array in arrays]
    blocks = list(blocks)
    chance.shuffle(blocks)
    with np.errstate(all="ignore"):
        for place in blocks:
            Block(kernel.warps, kernel.descriptors, arrays, times, place, late).run(kernel.instructions, chance)
    return times
