"""Devices, and which part of every array each of them holds.

Axis types are Auto everywhere: `jax.jit` sees global arrays, so sums over rows (losses, expert counts, maximum
logits) are global by construction; `jax.shard_map` is used only where communication is the point.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.param_spec import ParamSpec, Specs
from configs.schema import ConfigError, MeshConfig, require

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""

RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "experts": (("expert", "fsdp"), ("expert",)),
    "heads": (("tensor",), ("fsdp",), ("expert",)),
    "hidden": (("tensor",),),
    "expert_hidden": (("tensor",),),
    "vocab": (("tensor",),),
    "embed": (("fsdp", "expert"), ("fsdp",), ("expert",)),
}
"""Logical axis -> mesh axes, best first; the first choice that divides and is still free in the array is taken.
Experts take fsdp too where they divide: their Newton-Schulz then needs no communication. Axes not named here are
never split. Earlier entries choose first."""

REPLICATED_LIMIT = 1 << 22
"""Elements above which an array that no rule splits is an error on a mesh that could split it."""


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A mesh of all five axes; the product must be the device count."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(cfg)
    others = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    sizes["data"] = sizes["data"] or max(len(devices) // others, 1)
    require(sizes["data"] * others == len(devices),
            f"the mesh {' x '.join(f'{k}={v}' for k, v in sizes.items())} has {sizes['data'] * others} places but there are "
            f"{len(devices)} devices; choose axes whose product is {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices,
                         axis_types=(AxisType.Auto,) * len(sizes))


def check_rows(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Every device must get the same number of rows of every microbatch."""
    ways = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))
    require(batch_size % (ways * accumulate) == 0,
            f"train.batch_size={batch_size} cannot be split over {ways} devices and train.accumulate={accumulate}; "
            f"the nearest that can: {max(batch_size // (ways * accumulate), 1) * ways * accumulate}")


def param_sharding(spec: ParamSpec, mesh: Mesh) -> NamedSharding:
    """Where a parameter lives, from its logical axes."""
    chosen: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for logical, choices in RULES.items():
        if logical not in spec.axes:
            continue
        size = spec.shape[spec.axis(logical)]
        for axes in choices:
            ways = int(np.prod([mesh.shape[a] for a in axes]))
            if ways > 1 and size % ways == 0 and not used & set(axes):
                chosen[logical] = axes
                used |= set(axes)
                break
    splittable = int(np.prod([mesh.shape[a] for a in ("fsdp", "expert", "tensor")]))
    if splittable > 1 and not chosen and spec.size > REPLICATED_LIMIT:
        raise ConfigError(f"{spec.hf[0].name} {spec.shape} would be replicated: none of its axes {spec.axes} divides "
                          f"over the mesh {dict(mesh.shape)}; change the mesh or the width")
    return NamedSharding(mesh, P(*(chosen.get(axis) for axis in spec.axes)))


def param_shardings(specs: Specs, mesh: Mesh) -> dict[str, NamedSharding]:
    return {path: param_sharding(spec, mesh) for path, spec in specs.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every axis that splits them, positions over context."""
    return NamedSharding(mesh, P(ROW_AXES, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu: of the devices the program is compiled for, which need not be there."""
    return mesh.devices.flat[0].platform
