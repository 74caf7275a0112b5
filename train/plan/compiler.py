"""The compiler in a process of its own, which is left when it has decided everything that a plan reads.

A compiler first optimises and schedules a program and lays out its memory, writes all that down, and then generates machine
code. The second part takes several times as long as the first, for Kimi K2 more than ten minutes, and changes no operation, no
collective and no buffer. What it alone can find is a kernel that does not compile: tests/plan compiles each of ours by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from configs.schema import ConfigError, RunConfig
from model.transformer import param_specs
from train.compat import compile_for_devices, start_jax
from train.mesh import check_mesh, make_mesh
from train.plan.topology import Topology
from train.program import step_program
from train.state import TrainState
from train.step import abstract_batch

DECISIONS = ("after_optimizations.txt", "after_optimizations-live-range.txt", "after_optimizations-memory-usage-report.txt")
"""What libtpu and XLA's GPU compiler write of a program, in no order, once it is decided."""

SETTLED = 10.0
"""Seconds without another write to them, of which the slowest program we saw needs two."""


@dataclass(frozen=True)
class Outcome:
    """How a compilation ended: with machine code, or left before it, or `too_large` for the chip. temp, host: bytes of the
    program's own memory on the device and in the host, known with the code only (0 else)."""

    seconds_to_lower: float
    seconds_to_compile: float
    has_code: bool = False
    too_large: bool = False
    temp: int = 0
    host: int = 0


def abstract_step(cfg: RunConfig, topology: Topology) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct], Mesh]:
    """The jitted step of `cfg` on a machine, and the state and batch it takes as shapes in their shardings."""
    mesh = make_mesh(cfg.mesh, topology.devices())
    check_mesh(cfg, mesh)
    asked = cfg.train.compute_dtype
    program = step_program(cfg, param_specs(cfg.model), mesh, "bfloat16" if asked == "auto" else asked)
    return program.jitted(program.settles_at is not None), program.state, abstract_batch(cfg, mesh), mesh


def compile_apart(cfg: RunConfig, topology: Topology, folder: Path) -> Outcome:
    """Compile in another process; what the compiler wrote about the program is in `folder` afterwards. ConfigError with the
    compiler's sentence where the machine cannot run the step."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_compile, args=(cfg, topology, folder, there), daemon=True)
    child.start()
    there.close()
    try:
        lowering = _receive(here, topology)
        started = time.monotonic()
        while not here.poll(1.0):
            if _decided(folder):
                return Outcome(lowering, time.monotonic() - started - SETTLED)
        return Outcome(lowering, time.monotonic() - started, **_receive(here, topology))
    finally:
        child.kill()
        child.join()


def _receive(connection: Any, topology: Topology) -> Any:
    """The child's next word; ConfigError where it is an error or nothing."""
    try:
        word = connection.recv()
    except EOFError:
        raise ConfigError(f"the compiler for {topology.name} ended without a word; is there enough memory?") from None
    if isinstance(word, str):
        raise ConfigError(word)
    return word


def _compile(cfg: RunConfig, topology: Topology, folder: Path, parent: Any) -> None:
    """In the child: sends the seconds of lowering and the fields of an Outcome, or a sentence."""
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    start_jax("cpu")
    step, state, batch, mesh = abstract_step(cfg, topology)
    devices = list(mesh.devices.flat)
    started = time.monotonic()
    try:
        with jax.default_device(devices[0]):  # kernels that ask which device they are for must not find the host
            lowered = step.lower(state, batch)
            parent.send(time.monotonic() - started)
            memory = compile_for_devices(lowered, folder, devices).memory_analysis()
        parent.send({"has_code": True, "temp": memory.temp_size_in_bytes, "host": memory.host_temp_size_in_bytes})
    except ConfigError as error:
        parent.send(str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            parent.send({"too_large": True})
        else:
            parent.send(f"{topology.name} cannot run this step: {str(error).splitlines()[0][:300]}")


def _end_with(parent: Any) -> None:
    """A killed `plan` would otherwise leave its compiler at work."""
    parent.join()
    os._exit(1)


def _decided(folder: Path) -> bool:
    """Whether the compiler has written down all of the step's program, and some time ago."""
    found = [max(folder.glob(f"*train_step*{ending}"), key=lambda p: p.stat().st_size, default=None) for ending in DECISIONS]
    if None in found or not all(file.stat().st_size for file in found):
        return False
    return max(file.stat().st_mtime for file in found) < time.time() - SETTLED and "Total bytes" in found[2].read_text()
