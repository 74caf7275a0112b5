"""Which parameters live on the grid, and whether every group lies whole on one device. Checked at start-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Sharding

from configs.param_spec import ParamSpec, Specs
from configs.schema import ConfigError, QuantConfig


@dataclass(frozen=True)
class Row:
    """One stored array: how many weights, and groups where it is on the grid."""

    path: str
    weights: int
    groups: int


@dataclass(frozen=True)
class Coverage:
    """What the grid rule reaches."""

    on_grid: tuple[Row, ...]
    plain: tuple[Row, ...]

    @property
    def share(self) -> float:
        """Weights on the grid over all weights."""
        quantized = sum(r.weights for r in self.on_grid)
        return quantized / (quantized + sum(r.weights for r in self.plain))

    def __str__(self) -> str:
        lines = [f"{r.path}: {r.weights:,} weights in {r.groups:,} groups" for r in self.on_grid]
        return "\n".join([*lines, f"{self.share:.1%} of all weights are on the grid"])


def group_axis(spec: ParamSpec) -> int:
    """Position of the grouped (input) axis, counted from the end: leading stacked axes may be sliced away."""
    return spec.axis(spec.matrix.rows[0]) - len(spec.axes)


def coverage(specs: Specs, quant: QuantConfig) -> Coverage:
    """The report; raises ConfigError where a grid is asked for and reaches nothing, or does not divide a width."""
    on_grid, plain = [], []
    for path, spec in specs.items():
        if quant.grid == "none" or not spec.on_grid:
            plain.append(Row(path, spec.size, 0))
            continue
        inputs = spec.shape[group_axis(spec)]
        if inputs % quant.group_size:
            raise ConfigError(f"{path} has {inputs} inputs, which quant.group_size={quant.group_size} does not divide")
        on_grid.append(Row(path, spec.size, spec.size // quant.group_size))
    if quant.grid != "none" and not on_grid:
        raise ConfigError("quant.grid is on, but no parameter is declared on the grid; set quant.grid to none")
    return Coverage(tuple(on_grid), tuple(plain))


def require_whole_groups(specs: Specs, shardings: Mapping[str, Sharding], quant: QuantConfig) -> None:
    """Raises ConfigError where a device would hold part of a group: its scale could then not be known locally."""
    if quant.grid == "none":
        return
    for path, spec in specs.items():
        if not spec.on_grid:
            continue
        local = shardings[path].shard_shape(spec.shape)[group_axis(spec)]
        if local % quant.group_size:
            parts = math.ceil(spec.shape[group_axis(spec)] / local)
            raise ConfigError(
                f"the mesh cuts the inputs of {path} into {parts} parts of {local}, but a group of "
                f"{quant.group_size} must lie on one device; use a smaller mesh axis there"
            )
