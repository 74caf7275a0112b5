"""`launch.py plan`: what a config is, before anything is trained: parameters, update rules, bytes, FLOPs."""

from __future__ import annotations

import dataclasses

from jax.sharding import AbstractMesh, AxisType
from rich.box import SIMPLE
from rich.table import Table

from configs.schema import RunConfig
from model.transformer import param_specs
from optim.build import plan_of
from optim.plan import COLUMNS, plan_rows, total_flops
from optim.routing import routing_table
from train.console import console, human
from train.counts import cache_bytes_per_token, parameters, served_bytes, state_bytes, train_flops_per_token
from train.mesh import check_sizes, param_shardings
from train.run_dir import config_hash


def planned_mesh(cfg: RunConfig) -> AbstractMesh:
    """The config's mesh without devices; mesh.data 0 counts as 1."""
    sizes = {axis: max(size, 1) for axis, size in dataclasses.asdict(cfg.mesh).items()}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def show_plan(name: str, cfg: RunConfig) -> int:
    """Print the ParamSpec table with each array's update rule and grid, then the totals."""
    mesh = planned_mesh(cfg)
    check_sizes(cfg, mesh.shape)
    specs = param_specs(cfg.model)
    routes = {route.path: route for route in routing_table(specs, cfg.optim)}
    table = Table(title=f"{name} (config {config_hash(cfg)})", box=SIMPLE)
    table.add_column("array", no_wrap=True)  # here and below: names stay whole on a narrow terminal
    for column in ("shape", "axes", "updated by", "matrices", "served as"):
        table.add_column(column, overflow="fold", min_width=8)
    for path, spec in specs.items():
        matrices = ", ".join(f"{count} of {rows} x {cols}" for count, rows, cols in routes[path].matrices)
        served = cfg.quant.grid if spec.on_grid and cfg.quant.grid != "none" else spec.served or cfg.model.dtype
        table.add_row(path, " x ".join(map(str, spec.shape)), " ".join(spec.axes), routes[path].rule, matrices, served)
    console.print(table)

    groups = plan_of(specs, cfg.optim, "tpu", mesh=mesh, shardings=param_shardings(specs, mesh))
    title = f"Newton-Schulz on TPUs, mesh {dict(mesh.shape)}: {human(total_flops(groups))}FLOP per step in all"
    table = Table(title=title, box=SIMPLE)
    matrices, arrays, *more = COLUMNS
    table.add_column(f"{matrices} of {arrays}", no_wrap=True)
    for column in more:
        table.add_column(column, overflow="fold")
    for matrices, arrays, where, form, count, *work in plan_rows(groups, itemsize=2):
        table.add_row("\n".join([matrices, *arrays.split(", ")]), where, form, count, *(human(float(cell)) for cell in work))
    console.print(table)

    counts, state = parameters(cfg.model, specs), state_bytes(specs, cfg.optim)
    tokens = cfg.train.batch_size * cfg.train.seq_len
    flops = train_flops_per_token(cfg.model, specs, cfg.train.seq_len)
    grid = sum(spec.size for spec in specs.values() if spec.on_grid) if cfg.quant.grid != "none" else 0
    served = served_bytes(cfg.model, specs, cfg.quant)
    facts = Table(show_header=False)
    for label, value in (
        ("parameters", f"{counts.total:,}"),
        ("active per token", f"{counts.active:,} with both embeddings, {counts.active_without_embed:,} without the input one"),
        (
            "on no grid" if cfg.quant.grid == "none" else f"on the {cfg.quant.grid.upper()} grid",
            f"{grid:,} ({100 * grid / counts.total:.1f} %)",
        ),
        ("training state", f"{human(state['masters'])}B masters, {human(state['moments'])}B optimizer moments"),
        (
            "exported",
            "cannot be: no engine reads the INT3 grid"
            if cfg.quant.grid == "int3"
            else f"{human(served)}B, {8 * served / counts.total:.2f} bits per parameter",
        ),
        ("decode cache", f"{human(cache_bytes_per_token(cfg.model, cfg.model.dtype))}B per token"),
        (
            "training FLOPs",
            f"{human(flops)} per token of a {cfg.train.seq_len}-token row, {human(flops * tokens)} per step "
            f"of {human(tokens)} tokens",
        ),
        (
            "run",
            f"{cfg.train.steps} steps, {human(cfg.train.steps * tokens)} tokens, {human(cfg.train.steps * tokens * flops)}FLOP",
        ),
    ):
        facts.add_row(label, value)
    console.print(facts)
    return 0
