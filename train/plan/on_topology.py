"""`launch.py plan --topology`: the step compiled for a machine that need not be there, printed; and the search for a mesh."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from rich.table import Table

from configs.param_spec import Specs
from configs.schema import ConfigError, MeshConfig, RunConfig
from configs.sharding import partition
from model.transformer import param_specs
from train.console import Bar, console, human
from train.counts import state_bytes
from train.mesh import ROW_AXES, check_sizes
from train.plan.aot import compile_step
from train.plan.forecast import MARGIN, Forecast, advice, forecast
from train.plan.topology import GIB, Topology, topology


def show_topology(name: str, cfg: RunConfig, machine: str, file: Path | None = None) -> int:
    """Compile the step for a machine, print what that tells, write it as JSON to `file`. 1 where it does not fit."""
    found = topology(machine)
    _require_writable(file)
    console.print(
        f"compiling the step of {name} for {found.chips} chip{'s' if found.chips > 1 else ''}, {found.name}"
        + (f", {found.slices} slices" if found.slices > 1 else "")
    )
    plan = forecast(compile_step(cfg, found))
    console.print(
        f"lowered in {plan.compiled.seconds_to_lower:.0f} s, compiled in {plan.compiled.seconds_to_compile:.0f} s"
        + ("" if plan.compiled.has_code else ", machine code left out: it would change nothing below")
    )
    for table in (memory_table(name, plan), arrays_table(plan), traffic_table(plan), time_table(plan)):
        console.print(table)
    console.print(verdict(plan))
    for sentence in advice(plan):
        console.print(f"- {sentence}")
    if file:
        file.write_text(json.dumps({"preset": name} | plan.summary(), indent=1) + "\n")
    return 0 if plan.compiled.fits else 1


def _require_writable(file: Path | None) -> None:
    """OSError before minutes of compiling rather than after them. A file that was not there is not there afterwards."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        file.open("a").close()
        if not there:
            file.unlink()


def memory_table(name: str, plan: Forecast) -> Table:
    """Bytes of one device by what they hold, against what it has."""
    c, m, hbm = plan.compiled, plan.compiled.memory, plan.compiled.topology.chip.hbm
    axes = " x ".join(f"{axis} {size}" for axis, size in c.mesh.shape.items() if size > 1) or "of one device"
    table = Table(title=f"{name} on {c.topology.name}, mesh {axes}: memory of one device")
    for column in ("held", "GiB", "share"):
        table.add_column(column, justify="left" if column == "held" else "right")
    for part in ("parameters", "optimizer", "batch", "gradients", "activations", "temporaries", "peak"):
        table.add_row(part, f"{getattr(m, part) / GIB:.2f}", f"{100 * getattr(m, part) / hbm:.1f} %")
    table.add_row("available", f"{hbm / GIB:.2f}", "")
    if m.host:
        table.add_row("in the host's memory", f"{m.host / GIB:.2f}", "")
    return table


def arrays_table(plan: Forecast) -> Table:
    """The largest arrays at the peak."""
    table = Table(title="largest arrays at the peak, besides the state")
    for column in ("GiB", "array", "made by"):
        table.add_column(column, overflow="fold")
    for array in plan.compiled.memory.largest[:6]:
        table.add_row(f"{array.bytes / GIB:.2f}", array.shape, array.made_by)
    return table


def traffic_table(plan: Forecast) -> Table:
    """Collectives by kind and mesh axes, loops counted as often as they run."""
    table = Table(title="collectives of one step, one device")
    for column in ("kind", "mesh axes", "times", "received", "seconds"):
        table.add_column(column)
    for t in plan.traffic[:12]:
        table.add_row(t.kind, " * ".join(t.axes) or "-", str(t.times), f"{human(t.bytes)}B", f"{t.seconds:.3g}")
    return table


def time_table(plan: Forecast) -> Table:
    """Where a step's seconds go."""
    w = plan.work
    table = Table(title="one step, one device")
    for column in ("limited by", "seconds", "share", "what"):
        table.add_column(column)
    for limit, seconds, what in (
        ("compute", w.compute, f"{human(w.flops)}FLOP counted, {human(plan.useful_flops)}FLOP useful"),
        ("memory bandwidth", w.memory, f"{human(w.bytes)}B read and written in all"),
        ("interconnect", w.exposed, f"waited for; {w.hidden:.3g} s more run beside other work"),
        ("step", plan.seconds, ""),
    ):
        table.add_row(limit, f"{seconds:.3g}", f"{100 * seconds / plan.seconds:.0f} %", what)
    return table


def verdict(plan: Forecast) -> str:
    """Two sentences: does it fit, how fast."""
    m, hbm = plan.compiled.memory, plan.compiled.topology.chip.hbm
    if not plan.compiled.fits:
        fit = f"[red]Out of memory[/]: {m.peak / GIB:.1f} GiB are needed, {hbm / GIB:.1f} GiB are there."
    else:
        fit = (
            f"Fits with {100 * plan.spare:.1f} % to spare"
            + ("" if plan.spare >= MARGIN else f", less than the {100 * MARGIN:.0f} % that a plan should leave")
            + "."
        )
    return (
        f"{fit} Bound by {plan.bound}: {plan.seconds:.3g} s a step, {human(plan.tokens_per_second_per_chip)} tokens/s per "
        f"chip, {100 * plan.mfu:.1f} % of the bf16 peak."
    )


def candidates(cfg: RunConfig, machine: Topology) -> list[MeshConfig]:
    """Meshes worth compiling, most promising first: every axis a power of two (times what is left over for fsdp), all that is
    split divides, the state alone leaves half the memory. Context is split for long rows only, tensor never beyond 8."""
    count, specs = machine.device_count, param_specs(cfg.model)
    state = sum(state_bytes(specs, cfg.optim).values())
    powers = [2**i for i in range(count.bit_length())]
    found = []
    for expert, context, tensor, data in itertools.product(powers, powers, [p for p in powers if p <= 8], powers):
        others = expert * context * tensor * data
        if count % others or data % machine.slices or (context > 1 and cfg.train.seq_len // context < 4096):
            continue
        mesh = MeshConfig(data=data, fsdp=count // others, expert=expert, context=context, tensor=tensor)
        if state / (count // data) <= machine.chip.hbm / 2 and _divides(cfg, specs, mesh):
            found.append(mesh)
    # Few copies of the weights first; then experts over at most a ring of eight; then little of context and tensor.
    return sorted(found, key=lambda m: (m.tensor * m.context, m.data, abs(m.expert.bit_length() - 4)))


def _divides(cfg: RunConfig, specs: Specs, mesh: MeshConfig) -> bool:
    sizes = dataclasses.asdict(mesh)
    try:
        check_sizes(cfg, sizes)
        for spec in specs.values():
            partition(spec, sizes)
    except ConfigError:
        return False
    return True


def sweep(name: str, cfg: RunConfig, machine: str, limit: int, file: Path | None = None) -> int:
    """Compile up to `limit` meshes and rank them by predicted speed. 1 where none fits."""
    found = topology(machine)
    meshes = candidates(cfg, found)
    if not meshes:
        raise ConfigError(
            f"no mesh of {found.device_count} devices divides train.batch_size={cfg.train.batch_size} over "
            f"train.accumulate={cfg.train.accumulate} microbatches with room for the state; change one of them, "
            f"or take more chips"
        )
    found.devices()  # whether there is a compiler for it
    _require_writable(file)
    console.print(
        f"{len(meshes)} meshes of {'/'.join((*ROW_AXES, 'context', 'tensor'))} are possible on {found.name}; "
        f"compiling {min(limit, len(meshes))}"
    )
    plans, failed = [], []
    with Bar("compiling", min(limit, len(meshes)), "mesh") as bar:
        for mesh in meshes[:limit]:
            try:
                plans.append(forecast(compile_step(dataclasses.replace(cfg, mesh=mesh), found)))
            except ConfigError as error:
                failed.append((mesh, str(error)))
            bar.advance()
    plans.sort(key=lambda p: (not p.compiled.fits, p.seconds if p.compiled.fits else p.compiled.memory.peak))
    table = Table(title=f"{name} on {found.name}: meshes, best first")
    for column in ("data", "fsdp", "expert", "context", "tensor", "peak GiB", "spare", "step s", "tok/s/chip", "MFU", "bound"):
        table.add_column(column)
    for p in plans:
        sizes = [str(p.compiled.mesh.shape[a]) for a in ("data", "fsdp", "expert", "context", "tensor")]
        fits = [
            f"{100 * p.spare:.0f} %",
            f"{p.seconds:.3g}",
            human(p.tokens_per_second_per_chip),
            f"{100 * p.mfu:.1f} %",
            p.bound,
        ]
        table.add_row(*sizes, f"{p.compiled.memory.peak / GIB:.1f}", *(fits if p.compiled.fits else ["no", "", "", "", ""]))
    console.print(table)
    for mesh, reason in failed:
        console.print(f"{mesh}: {reason}", markup=False)
    if file:
        file.write_text(json.dumps({"preset": name, "sweep": [p.summary() for p in plans]}, indent=1) + "\n")
    return 0 if plans and plans[0].compiled.fits else 1
