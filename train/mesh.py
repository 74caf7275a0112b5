"""Devices, and which part of every array each of them holds: configs/sharding.py as jax's meshes and shardings.

Axis types are Auto everywhere. Arrays outside the step are global; train/step.py hands each device its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.param_spec import ParamSpec, Specs
from configs.platforms import platform_of
from configs.schema import MeshConfig, RunConfig, require
from configs.sharding import ROW_AXES, check_model, check_positions, partition
from train.compat import device_grid


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A mesh of all five axes; the product must be the device count."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(cfg)
    others = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    sizes["data"] = sizes["data"] or max(len(devices) // others, 1)
    require(
        sizes["data"] * others == len(devices),
        f"the mesh {' x '.join(f'{k}={v}' for k, v in sizes.items())} has {sizes['data'] * others} places but there are "
        f"{len(devices)} devices; choose axes whose product is {len(devices)}",
    )
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    require(
        sizes["data"] % slices == 0,
        f"mesh.data={sizes['data']} is no multiple of the {slices} slices: only copies of the "
        f"model may lie apart; set mesh.data to a multiple of {slices}",
    )
    grid = device_grid(tuple(sizes.values()), list(devices))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_rows(batch_size: int, accumulate: int, sizes: Mapping[str, int]) -> None:
    """Every device must get the same number of rows of every microbatch."""
    ways = int(np.prod([sizes[axis] for axis in ROW_AXES]))
    require(
        batch_size % (ways * accumulate) == 0,
        f"train.batch_size={batch_size} cannot be split over {ways} devices and train.accumulate={accumulate}; "
        f"the nearest that can: {max(round(batch_size / (ways * accumulate)), 1) * ways * accumulate}",
    )


def check_sizes(cfg: RunConfig, sizes: Mapping[str, int]) -> None:
    """ConfigError, with the fix, where a mesh axis of this size does not divide what it splits: rows of every microbatch,
    positions of a row, experts, heads, widths."""
    check_model(cfg.model, sizes)
    check_positions(cfg.train.seq_len, sizes)
    check_rows(cfg.train.batch_size, cfg.train.accumulate, sizes)


def check_mesh(cfg: RunConfig, mesh: Mesh) -> None:
    """The same for a mesh of devices, and that they know the run's transport."""
    check_sizes(cfg, mesh.shape)
    require(
        mesh.shape["expert"] == 1 or cfg.train.transport != "ragged_all_to_all" or platform(mesh) != "cpu",
        "train.transport ragged_all_to_all does not exist on cpu devices; take all_to_all, which moves the same and the "
        "padding of its buffers, or auto",
    )


def param_sharding(spec: ParamSpec, mesh: Mesh) -> NamedSharding:
    """Where a parameter lives, from its logical axes."""
    return NamedSharding(mesh, P(*(axes or None for axes in partition(spec, mesh.shape))))


def param_shardings(specs: Specs, mesh: Mesh) -> dict[str, NamedSharding]:
    return {path: param_sharding(spec, mesh) for path, spec in specs.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every axis that splits them, positions over context."""
    return NamedSharding(mesh, P(ROW_AXES, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def platform(mesh: Mesh) -> str:
    """Of the devices the program is compiled for, which need not be there: see configs/platforms.py."""
    return platform_of(mesh.devices.flat[0])
