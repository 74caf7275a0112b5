"""How far the masters are from the grid that the forward pass sees. Traced, as all of quant/metrics.py."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.param_spec import Specs
from quant import grid
from quant.coverage import group_axis


def _sums(w: Array, axis: int, group: int, levels: int) -> tuple[Array, Array, Array]:
    codes, scales = grid.quantize(w, axis, group, levels)
    error = grid.dequantize(codes, scales, axis, group) - w
    return jnp.sum(error**2), jnp.sum(w.astype(jnp.float32) ** 2), jnp.sum(jnp.abs(codes) == levels, dtype=jnp.float32)


def grid_error(
    params: dict[str, Array], specs: Specs, group: int, levels: int = grid.LEVELS["int4"]
) -> dict[str, Float[Array, ""]]:
    """Over all weights on the grid: RMS of (grid value - master) over RMS of master, and the share of outermost codes
    (at least one in every group, by construction)."""
    sums = [_sums(params[path], group_axis(spec), group, levels) for path, spec in specs.items() if spec.on_grid]
    error, size, edge = (sum(column) for column in zip(*sums))
    count = float(sum(spec.size for spec in specs.values() if spec.on_grid))  # too many for an int32
    return {"grid_error": jnp.sqrt(error / size), "codes_at_edge": edge / count}
