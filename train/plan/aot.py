"""The real train step, compiled ahead of time from abstract shapes for chips that need not be there."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.param_spec import Specs
from configs.schema import RunConfig
from model.transformer import param_specs
from train.mesh import param_shardings
from train.plan.compiler import Outcome, abstract_step, compile_apart
from train.plan.hlo import Program
from train.plan.topology import Topology


@dataclass(frozen=True)
class Array:
    """An array that is held when the program needs most. `made_by`: the operation in the model, or a state's path."""

    bytes: int
    shape: str
    made_by: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    parameters, optimizer, batch   what the step is given, a teacher among the first; the first two are written over in place
    activations                    kept from the forward to the backward pass, at the peak
    gradients                      as large as a parameter, at the peak
    temporaries                    the rest of the program's own memory at its peak
    host                           held in the host's memory meanwhile
    largest                        the largest arrays at the peak, besides the state
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    gradients: int
    temporaries: int
    host: int
    largest: tuple[Array, ...]

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.activations + self.gradients + self.temporaries


@dataclass(frozen=True)
class Compiled:
    """What compiling told. `fits` is the compiler's own answer. seconds_to_compile: until it had decided everything that is
    read here; has_code: whether machine code was waited for (train/plan/compiler.py)."""

    cfg: RunConfig
    topology: Topology
    mesh: Mesh
    specs: Specs
    program: Program
    memory: Memory
    fits: bool
    seconds_to_lower: float
    seconds_to_compile: float
    has_code: bool


def local_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device, by their shardings."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(cfg: RunConfig, topology: Topology) -> Compiled:
    """Lower and compile the step of `cfg` on a machine, the one with experts on the grid if they ever are. ConfigError
    where the config does not fit the machine's mesh, or the machine cannot run the step."""
    _, state, batch, mesh = abstract_step(cfg, topology)
    specs = param_specs(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        outcome = compile_apart(cfg, topology, Path(folder))
        program = Program(_newest(Path(folder), "after_optimizations.txt").read_text())
        given = {
            "parameters": local_bytes((state.params, state.teacher)),
            "optimizer": local_bytes((state.optimizer, state.step)),
            "batch": local_bytes(batch),
        }
        counts_given = topology.chip.platform == "cuda"
        layers = cfg.model.num_moe_layers
        memory = _memory(program, Path(folder), given, outcome, specs, param_shardings(specs, mesh), layers, counts_given)
    return Compiled(
        cfg,
        topology,
        mesh,
        specs,
        program,
        memory,
        not outcome.too_large and memory.peak <= topology.chip.hbm,
        outcome.seconds_to_lower,
        outcome.seconds_to_compile,
        outcome.has_code,
    )


def _newest(folder: Path, ending: str) -> Path | None:
    """The dump of the step itself; helpers that are compiled beside it are smaller."""
    return max(folder.glob(f"*train_step*{ending}"), key=lambda p: p.stat().st_size, default=None)


def _memory(
    program: Program,
    folder: Path,
    given: dict[str, int],
    outcome: Outcome,
    specs: Specs,
    shardings: dict,
    layers: int,
    counts_given: bool,
) -> Memory:
    """The state's bytes by its shardings; the program's own at its peak, told apart by shape. counts_given: the compiler's
    report has what the step is given in its total, as XLA's for GPUs does and libtpu's does not."""
    temp = outcome.temp if outcome.has_code else _total(folder) - (sum(given.values()) if counts_given else 0)
    held = _at_peak(program, folder)
    shards = {tuple(shardings[path].shard_shape(spec.shape)) for path, spec in specs.items()}
    stacked = {shape[1:] for shape in shards if len(shape) > 2}

    def is_gradient(array: Array) -> bool:
        dims = _dims(array.shape)
        return dims in shards or (dims[:1] == (layers,) and dims[1:] in stacked)

    def is_activation(array: Array) -> bool:
        return _dims(array.shape)[:1] == (layers,) and len(_dims(array.shape)) > 2 and not is_gradient(array)

    live = sum(a.bytes for a in held) or 1
    share = min(temp / live, 1.0)  # arrays that the compiler laid over each other count once
    gradients = round(share * sum(a.bytes for a in held if is_gradient(a)))
    activations = round(share * sum(a.bytes for a in held if is_activation(a)))
    return Memory(
        **given,
        activations=activations,
        gradients=gradients,
        temporaries=temp - gradients - activations,
        host=outcome.host,
        largest=tuple(sorted(held, key=lambda a: -a.bytes)[:8]),
    )


def _dims(shape: str) -> tuple[int, ...]:
    found = re.search(r"\[([0-9,]*)\]", shape)
    return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()


def _total(folder: Path) -> int:
    """Bytes of the program's own memory from the compiler's report, where no program came of it; some 4 MB that libtpu adds
    to every program are not in it."""
    report = _newest(folder, "memory-usage-report.txt")
    found = re.search(r"Memory Space: default.*?Total bytes: (\d+)", report.read_text(), re.S) if report else None
    return int(found.group(1)) if found else 0


def _at_peak(program: Program, folder: Path) -> list[Array]:
    """Arrays alive at the compiler's peak, parameters of the step and the fast memory of a core left out. One that has
    several names in a row, as the sum of a loop has before it and in it, is there once, by the operation that made it."""
    report = _newest(folder, "live-range.txt")
    text = report.read_text() if report else ""
    peak = re.search(r"\(peak\):\n(.*?)(?:\n  \S|\Z)", text, re.S)
    entry = program.computations[program.entry]
    made = {name: i for scope in program.computations.values() for name, i in scope.items()}
    places, held = _places(folder), {}
    for line in peak.group(1).splitlines() if peak else ():
        found = re.match(r"\s+(\S+?)\{([0-9,]*)\}: (\d+) bytes", line)
        if not found or (found.group(1) in entry and entry[found.group(1)].kind == "parameter"):
            continue
        name, index, size = found.group(1), found.group(2), int(found.group(3))
        instruction = made.get(name)
        if instruction is None:
            continue
        shapes, number = instruction.shapes, index.split(",")[0]
        shape = shapes[int(number)] if number and int(number) < len(shapes) else shapes[0] if shapes else None
        if shape is None or shape.space:
            continue
        array = Array(size, f"{shape.dtype}[{','.join(map(str, shape.dims))}]", instruction.op_name or instruction.name)
        place = places.get((name, index), (name, index)), size
        if place not in held or instruction.kind != "parameter":
            held[place] = array
    return list(held.values())


def _places(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """Where the compiler laid every value, by its instruction's name and index: an allocation and an offset in it."""
    report = _newest(folder, "buffer-assignment.txt")
    places, allocation = {}, ""
    for line in report.read_text().splitlines() if report else ():
        if begins := re.match(r"allocation (\d+):", line):
            allocation = begins.group(1)
        elif value := re.match(r"\s*value: <\d+ (\S+?)(?:\{([0-9,]*)\})? .*?offset=(\d+)\)", line):
            places[value.group(1), value.group(2) or ""] = allocation, value.group(3)
    return places
