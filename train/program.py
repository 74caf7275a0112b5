"""The program of a run's step: what training calls, `plan` compiles for machines that are not there, and benchmarks vary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from configs.param_spec import Specs
from configs.schema import RunConfig
from model.shards import shards_of
from optim.build import build_optimizer
from optim.schedules import learning_rate
from quant.coverage import coverage, require_whole_groups
from quant.served import settled_step
from train.mesh import param_shardings, platform, replicated
from train.state import TrainState, abstract_state
from train.step import StepConfig, make_train_step


@dataclass(frozen=True)
class StepProgram:
    """state: shapes, dtypes and shardings of what the step takes and returns."""

    cfg: RunConfig
    specs: Specs
    mesh: Mesh
    compute_dtype: str
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState

    @property
    def settles_at(self) -> int | None:
        """The optimizer step from which on training calls the program for a settled grid: it gathers experts packed, and reads
        their masters once, not again for the case that the grid is not whole. None without a grid, and where experts are not
        gathered on a CPU, which would compile another program longer than that one saves."""
        shards = shards_of(self.mesh)
        gathered = any(spec.on_grid and shards.gathers(spec) for spec in self.specs.values())
        return settled_step(self.cfg.quant) if gathered or platform(self.mesh) != "cpu" else None

    def config(self, settled: bool = False) -> StepConfig:
        """`settled`: for the steps from which on the experts are wholly on the grid (quant/served.py)."""
        return StepConfig(self.cfg, self.compute_dtype, platform(self.mesh), self.mesh, settled)

    def step(self, settled: bool = False) -> Callable:
        """The pure function."""
        schedule = learning_rate(self.cfg.optim, self.cfg.train.steps)
        return make_train_step(self.config(settled), self.specs, self.optimizer, schedule)

    def jitted(self, settled: bool, options: dict[str, Any] | None = None) -> Callable:
        """(state, batch) -> (state, metrics), the state written over in place; compiled when it is first called."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(
            self.step(settled), donate_argnums=0, out_shardings=(placed, replicated(self.mesh)), compiler_options=options or None
        )


def step_program(cfg: RunConfig, specs: Specs, mesh: Mesh, compute_dtype: str) -> StepProgram:
    """On a mesh whose devices need not be there. ConfigError where the grid does not fit the experts or their parts."""
    shardings = param_shardings(specs, mesh)
    coverage(specs, cfg.quant)
    require_whole_groups(specs, shardings, cfg.quant)
    optimizer = build_optimizer(specs, cfg.optim, cfg.train.steps, compute_dtype, mesh=mesh, shardings=shardings)
    return StepProgram(cfg, specs, mesh, compute_dtype, optimizer, abstract_state(cfg, specs, optimizer, mesh))
