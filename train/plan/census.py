"""What a compiled program multiplies and moves, read from its HLO text: the tests', the benchmarks' and the plan's witness.

`compiled.cost_analysis()` counts the body of a loop once; here a body counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from model.experts import EVEN_LOAD
from model.transport.rounds import OVERFLOW
from optim.gram import GUARD
from train.plan.hlo import Instruction, Program

COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """bytes: size of its result on one device. group: devices that take part, `members` those of the first group by
    their place in the mesh, of a permute those of all its pairs, one after another. in_loop: inside a while body. times: how
    often it runs. overlaps: it has a start and a done, with other work in between."""

    kind: str
    bytes: int
    group: int
    in_loop: bool
    members: tuple[int, ...] = ()
    times: float = 1
    overlaps: bool = False
    op_name: str = ""

    @property
    def received(self) -> int:
        """Bytes one device receives in one run, by the usual ring counts."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "reduce-scatter": self.group - 1, "collective-permute": 1.0}
        return round(self.bytes * share.get(self.kind, others))


@dataclass(frozen=True)
class Census:
    """Of one device's program. flops: of matrix products, multiply and add counted apart."""

    flops: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        return sum(c.received * c.times for c in self.collectives)

    def kinds(self, over_bytes: int = 0) -> dict[str, int]:
        """How often each kind of collective occurs with a result of more than `over_bytes`."""
        out: dict[str, int] = {}
        for c in self.collectives:
            if c.bytes > over_bytes:
                out[c.kind] = out.get(c.kind, 0) + round(c.times)
        return out


def _members(rest: str, devices: int) -> tuple[tuple[int, ...], int]:
    """Devices of the first group and the size of a group; the four ways to write them, and none for every device."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", rest):
        first = tuple(int(n) for n in listed.group(1).split(","))
        return first, len(first)
    if iota := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", rest):
        groups, size = (int(n) for n in iota.group(1).split(","))
        shape = [int(n) for n in iota.group(2).split(",")]
        order = [int(n) for n in iota.group(3).split(",")] if iota.group(3) else range(len(shape))
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(groups, size)
        return tuple(int(n) for n in ids[0]), size
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        axes = [a.strip().strip("'") for a in mesh.group(3).split(",")] if mesh.group(3).strip() else list(sizes)
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        first = ids[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1)
        return tuple(int(n) for n in first), len(first)
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", rest):
        return tuple(int(n) for n in re.findall(r"\d+", pairs.group(1))), 2
    return tuple(range(devices)), devices


def collective(instruction: Instruction, devices: int) -> Collective | None:
    """The collective an instruction is or starts, None for any other."""
    kind = instruction.kind.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    started = instruction.kind.endswith("-start")
    shapes = [s for s in instruction.shapes if s.dims or s.dtype not in ("u32", "s32")]
    if started and kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all") and len(shapes) % 2 == 0:
        shapes = shapes[len(shapes) // 2 :]  # operands first, then results
    members, size = _members(instruction.rest, devices)
    return Collective(kind, sum(s.bytes for s in shapes), size, False, members, 1, started, instruction.op_name)


def open_trips(loop: Instruction, outer: float) -> float:
    """Mean trips of a loop whose bound is data, inside a loop of `outer` trips. Attention's runs over the tiles on or below
    the diagonal; a transport's further rounds are not needed with balanced experts."""
    return 0.0 if _inside(OVERFLOW, loop) else (outer + 1) / 2


def expected_branch(conditional: Instruction, runs: list, cost: Callable[[Any], float]) -> Any:
    """Of the runs of its branches the costliest; the cheapest where the other is a way out that a healthy run never takes."""
    return (min if _inside(GUARD, conditional) else max)(runs, key=cost)


def _inside(scope: str, instruction: Instruction) -> bool:
    """Whether it was made inside a name scope; a derivative's is jvp(scope)."""
    return bool(re.search(rf"[/(]{scope}[/)]", instruction.op_name))


def even_share(kernel: Instruction) -> float:
    """Of the work that an expert kernel states, the share that even experts give it."""
    found = re.search(EVEN_LOAD + r"([0-9.]+)", kernel.op_name)
    return float(found.group(1)) if found else 1.0


def census(hlo: str, devices: int = 1, *, causal: bool = False) -> Census:
    """Count an optimised HLO module. A loop with products or collectives but no known trip count is a ValueError, or,
    with `causal`, counted as attention over one document per row."""
    program = Program(hlo)

    def walk(name: str, outer: float, in_loop: bool) -> Census:
        flops, moved = 0, []
        for instruction in program.computations[name].values():
            flops += program.product_flops(name, instruction)
            if found := collective(instruction, devices):
                moved.append(replace(found, in_loop=in_loop))
            elif instruction.kind == "while":
                trips = program.trips(instruction)
                expected = open_trips(instruction, outer) if trips is None else trips
                inner = walk(program.called(instruction)[0], max(expected, 1), True)
                if trips is None and not causal and (inner.flops or inner.collectives):
                    raise ValueError(f"the trip count of loop {instruction.name} is not known")
                flops += expected * inner.flops
                moved += [replace(c, times=c.times * expected) for c in inner.collectives]
            elif called := program.called(instruction):
                inner = [walk(c, outer, in_loop) for c in called]
                if instruction.kind == "conditional":
                    inner = [expected_branch(instruction, inner, lambda c: c.flops)]
                for one in inner:
                    flops += one.flops
                    moved += one.collectives
        return Census(flops, tuple(moved))

    return walk(program.entry, 1, False)
