"""How long a compiled step should take on its chips: every operation at the rate of its scarcest resource.

A device works through a program's operations in the order the compiler gave them; each takes the longer of its arithmetic
and its memory traffic. A collective with a start and a done runs beside what stands between the two, one such after another;
what is not over at its done is waited for. Other collectives stop the device, and asynchronous copies count as memory traffic
where they start. Elementwise arithmetic is not counted: it hides behind
memory traffic except inside fused kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from model.experts import EVEN_LOAD
from train.plan.census import Collective, collective, even_share, expected_branch, open_trips
from train.plan.hlo import Instruction, Program, Shape
from train.plan.interconnect import Interconnect

_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "domain",
    "opt-barrier",
    "copy-done",
    "add-dependency",
}
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "triton_kernel_call")
"""Targets of Pallas kernels: the compiler cannot count them, they state their own cost: in a name scope, as the kernels of
kernels/hopper.py do, or by pallas_call's cost_estimate."""
STATED = re.compile(r"flops_(\d+)_bytes_(\d+)")


@dataclass
class Work:
    """Of one run of a computation on one device. Seconds by what limits them; `exposed` collectives are waited for."""

    compute: float = 0.0
    memory: float = 0.0
    exposed: float = 0.0
    hidden: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    silent: set[str] = field(default_factory=set)
    collectives: list[Collective] = field(default_factory=list)
    by_operation: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.exposed

    def add(self, other: Work, times: float = 1) -> None:
        """`times` runs of another computation, one after the other."""
        for name in ("compute", "memory", "exposed", "hidden", "flops", "bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.silent |= other.silent
        self.collectives += [replace(c, times=c.times * times) for c in other.collectives]
        for name, seconds in other.by_operation.items():
            self.by_operation[name] += times * seconds


class Beside:
    """Collectives that run beside a computation's own operations, one after another in order of their starts: they share
    the wires."""

    def __init__(self) -> None:
        self.free = 0.0  # when the last of it is over
        self.underway: dict[str, tuple[float, Work]] = {}

    def start(self, name: str, inner: Work, now: float) -> None:
        self.free = max(self.free, now) + inner.seconds
        self.underway[name] = self.free, inner

    def update(self, name: str, of: str, now: float) -> None:
        """A start without operands gets them here, and begins; any other goes on under this name."""
        ends, inner = self.underway.pop(of)
        if ends is None:
            self.start(name, inner, now)
        else:
            self.underway[name] = ends, inner

    def done(self, name: str, work: Work) -> None:
        """Wait for it, and count it in `work`."""
        ends, inner = self.underway.pop(name)
        waited = max((ends or 0.0) - work.seconds, 0.0)
        wires = inner.exposed / inner.seconds if inner.seconds else 1.0
        work.add(
            replace(
                inner,
                compute=0.0,
                memory=(1 - wires) * waited,
                exposed=wires * waited,
                hidden=wires * max(inner.seconds - waited, 0.0),
            )
        )


def label(op_name: str) -> str:
    """The model's part of an operation's path: without loops, transforms and the compiler's wrapping."""
    parts = [
        p
        for p in re.sub(r"jit\([^)]*\)|jvp|transpose|vmap|[()]", "", op_name).split("/")
        if p
        and not STATED.fullmatch(p)
        and not p.startswith(EVEN_LOAD)
        and p
        not in (
            "while",
            "body",
            "eval_jaxpr",
            "closed_call",
            "checkpoint",
            "rematted_computation",
            "cond",
            "shard_map",
            "branch_0_fun",
            "branch_1_fun",
        )
    ]
    return "/".join(parts[-2:]) or "compiler"


class Roofline:
    """Times a program on a machine."""

    def __init__(self, program: Program, wires: Interconnect):
        self.program, self.wires = program, wires
        chip = wires.topology.chip
        self.peak = chip.flops / chip.devices * chip.matmul
        self.memory_rate = chip.bandwidth / chip.devices * chip.memory
        self._done: dict[tuple[str, float], Work] = {}

    def step(self) -> Work:
        """The whole program, once."""
        return self.run(self.program.entry, 1)

    def run(self, computation: str, outer: float) -> Work:
        """One run of a computation inside a loop of `outer` trips."""
        if (computation, outer) in self._done:
            return self._done[computation, outer]
        work, beside = Work(), Beside()
        for instruction in self.program.computations[computation].values():
            self._instruction(work, beside, computation, instruction, outer)
        for name in list(beside.underway):
            beside.done(name, work)
        self._done[computation, outer] = work
        return work

    def _instruction(self, work: Work, beside: Beside, computation: str, instruction: Instruction, outer: float) -> None:
        """Add an instruction to `work`, or start, go on with or wait for what is `beside` it."""
        kind, name = instruction.kind, instruction.name
        first = instruction.operands[0].partition("#")[0] if instruction.operands else ""
        if kind in _FREE:
            return
        if kind.endswith("-done"):
            if first in beside.underway:
                beside.done(first, work)
        elif kind.endswith("-update"):
            if first in beside.underway:
                beside.update(name, first, work.seconds)
        elif found := collective(instruction, self.wires.mesh.size):
            moved = self._moved(found)
            if found.overlaps:
                beside.start(name, moved, work.seconds)
            else:
                work.add(moved)
        elif kind in ("async-start", "call-start"):
            inner = Work()
            for called in self.program.called(instruction):
                inner.add(self.run(called, outer))
            inner.collectives = [replace(c, overlaps=True) for c in inner.collectives]
            if not inner.collectives:  # copies share the memory's bandwidth with what they run beside
                work.add(inner)
            elif instruction.operands:
                beside.start(name, inner, work.seconds)
            else:
                beside.underway[name] = None, inner
        elif kind == "while":
            trips = self.program.trips(instruction)
            trips = open_trips(instruction, outer) if trips is None else trips
            work.add(self.run(self.program.called(instruction)[0], max(trips, 1)), trips)
        elif kind in ("conditional", "call"):
            if runs := [self.run(c, outer) for c in self.program.called(instruction)]:
                work.add(expected_branch(instruction, runs, lambda w: w.seconds))
        else:
            self._operation(work, beside, computation, instruction)

    def _operation(self, work: Work, beside: Beside, computation: str, instruction: Instruction) -> None:
        flops, moved, inner = self._cost(work, computation, instruction)
        for number, c in enumerate(inner):
            if c.overlaps:
                beside.start(f"{instruction.name} {number}", self._moved(c), work.seconds)
            else:
                work.add(self._moved(c))
        compute, memory = flops / self.peak, moved / self.memory_rate
        work.flops, work.bytes = work.flops + flops, work.bytes + moved
        if compute >= memory:
            work.compute += compute
        else:
            work.memory += memory
        work.by_operation[label(instruction.op_name)] += max(compute, memory)

    def _moved(self, c: Collective) -> Work:
        """A collective, waited for."""
        seconds = self.wires.seconds(c)
        return Work(
            exposed=seconds,
            collectives=[c],
            by_operation=defaultdict(float, {f"{c.kind} over {'*'.join(self.wires.spanned(c)) or 'one device'}": seconds}),
        )

    def _cost(self, work: Work, computation: str, instruction: Instruction) -> tuple[float, float, list[Collective]]:
        """FLOPs, bytes to and from main memory, and collectives fused into it."""
        if instruction.kind == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            if target and target.group(1) in KERNELS:
                if stated := _stated(instruction):
                    return *(even_share(instruction) * n for n in stated), []
                work.silent.add(label(instruction.op_name))
            elif target and target.group(1) in ("AllocateBuffer", "AssumeGatherIndicesInBound"):
                return 0.0, 0.0, []
        flops, inner = self._inside(computation, instruction)
        return flops, self._traffic(computation, instruction), inner

    def _inside(self, computation: str, instruction: Instruction) -> tuple[float, list[Collective]]:
        flops, inner = self.program.product_flops(computation, instruction), []
        if instruction.kind == "custom-call" and (stated := _stated(instruction)):  # a kernel that a fusion begins or ends with
            flops += stated[0] * even_share(instruction)
        for called in self.program.called(instruction):
            for one in self.program.computations.get(called, {}).values():
                if found := collective(one, self.wires.mesh.size):
                    inner.append(_scattering(found) if "all-reduce-scatter" in called else replace(found, overlaps=True))
                else:
                    more, found_inside = self._inside(called, one)
                    flops, inner = flops + more, inner + found_inside
        return flops, inner

    def _traffic(self, computation: str, instruction: Instruction) -> float:
        """Operands read and results written in main memory. Slices count as themselves, not as what they are cut from."""
        operands = self.program.operand_shapes(computation, instruction)
        read = [sum(s.bytes for s in shapes if s.space == 0) for shapes in operands]
        written = sum(s.bytes for s in instruction.shapes if s.space == 0)
        kind, body = instruction.kind, None
        if kind == "copy-start" or instruction.calls_cublas:  # its result names the source again, or room to work in
            written = sum(s.bytes for s in instruction.shapes[:1] if s.space == 0)
        if kind.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
            part = _part(instruction, operands)
            return part.bytes * (bool(read[0]) + (part.space == 0))
        if kind in ("dynamic-update-slice", "scatter"):
            return 2 * sum(read[1:])
        if kind == "fusion" and (called := self.program.called(instruction)):
            body = self.program.computations[called[0]]
            read = [min(r, self._read_inside(body, i)) for i, r in enumerate(read)]
            written = min(written, self._written_inside(called[0], next(i.name for i in body.values() if i.root)))
        return sum(read) + written

    def _read_inside(self, body: dict[str, Instruction], number: int) -> float:
        """Bytes a fusion reads of a parameter: slices where it is only cut, nothing where it is only written over."""
        name = next((i.name for i in body.values() if i.kind == "parameter" and i.rest.startswith(f"{number})")), None)
        if name is None:
            return float("inf")
        total, names = 0.0, {name}
        for user in body.values():  # operands come before their users
            operands = [o.partition("#")[0] for o in user.operands]
            if names.isdisjoint(operands):
                continue
            if _is_view(user) and not user.root:
                names.add(user.name)
            elif user.kind in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif user.kind not in ("dynamic-update-slice", "scatter") or operands[0] not in names:
                return float("inf")
        return total

    def _written_inside(self, called: str, name: str) -> float:
        """Bytes a fusion writes of a result: of an array that it is given and changes, what it changes."""
        body = self.program.computations[called]
        made = body[name]
        if made.kind == "tuple":
            return sum(self._written_inside(called, o.partition("#")[0]) for o in made.operands)
        if _is_view(made):
            return self._written_inside(called, made.operands[0].partition("#")[0])
        if made.kind in ("dynamic-update-slice", "scatter"):
            update = self.program.operand_shapes(called, made)[1 if made.kind == "dynamic-update-slice" else 2]
            rows = sum(s.bytes for s in update)
            return min(made.bytes, rows if made.kind == "dynamic-update-slice" else 2 * rows)
        return sum(s.bytes for s in made.shapes[: 1 if made.calls_cublas else None] if s.space == 0)


def _part(instruction: Instruction, operands: list[list[Shape]]) -> Shape:
    """What a slice cuts out. Where it is only started, its result names the operands first: all they are cut from."""
    started = instruction.kind.endswith("-start")
    return instruction.shapes[sum(len(shapes) for shapes in operands) if started else 0]


def _is_view(instruction: Instruction) -> bool:
    """Whether it moves nothing by itself: another shape of what it is given, or, in a TPU's fusion, other tiles."""
    retiled = len(instruction.operands) == 1 and "output_to_operand_aliasing={{}: (0, {})}" in instruction.rest
    return instruction.kind == "bitcast" or retiled


def _stated(kernel: Instruction) -> tuple[float, float] | None:
    """FLOPs and bytes by the kernel's own word."""
    if scope := STATED.search(kernel.op_name):
        return float(scope.group(1)), float(scope.group(2))
    found = [re.search(rf'\\?"{name}\\?":\s*\\?"?(\d+)', kernel.rest) for name in ("flops", "bytes_accessed")]
    return tuple(float(f.group(1)) for f in found) if all(found) and int(found[0].group(1)) else None


def _scattering(c: Collective) -> Collective:
    """A TPU's reduce-scatter, which it writes as a fusion of an all-reduce and a slice and waits for."""
    return replace(c, kind="reduce-scatter", bytes=c.bytes // c.group)
