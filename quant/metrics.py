"""What the grid does during training: error, saturation, and how many codes move, or move back.

Everything here is traced: call it inside the train step or a jitted function of its own. Arrays are taken from the
ParamSpec table; nothing is measured on weights that are not on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from configs.param_spec import Specs
from quant import grid
from quant.coverage import group_axis


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodeHistory:
    """codes: the codes after the last step; moved: the direction (-1, 0, 1) in which a code last moved."""

    codes: dict[str, Int8[Array, "..."]]
    moved: dict[str, Int8[Array, "..."]]


def codes_of(params: dict[str, Array], specs: Specs, group: int) -> dict[str, Int8[Array, "..."]]:
    """Codes of every parameter on the grid."""
    return {path: grid.quantize(params[path], group_axis(spec), group)[0] for path, spec in specs.items() if spec.on_grid}


def start_history(params: dict[str, Array], specs: Specs, group: int) -> CodeHistory:
    codes = codes_of(params, specs, group)
    return CodeHistory(codes, jax.tree.map(jnp.zeros_like, codes))


def grid_error(params: dict[str, Array], specs: Specs, group: int) -> dict[str, Float[Array, ""]]:
    """quant/error: ||w - grid(w)|| / ||w|| over all weights on the grid; quant/at_limit and quant/zero: shares of codes
    at +-7 and at 0."""
    noise = signal = limit = zero = jnp.float32(0)
    total = 0
    for path, spec in specs.items():
        if not spec.on_grid:
            continue
        w, axis = params[path].astype(jnp.float32), group_axis(spec)
        codes, scales = grid.quantize(w, axis, group)
        noise += jnp.sum(jnp.square(w - grid.dequantize(codes, scales, axis, group)))
        signal += jnp.sum(jnp.square(w))
        limit += jnp.sum(jnp.abs(codes) == grid.LEVELS, dtype=jnp.float32)
        zero += jnp.sum(codes == 0, dtype=jnp.float32)
        total += w.size
    return {"quant/error": jnp.sqrt(noise / jnp.maximum(signal, 1e-30)), "quant/at_limit": limit / total, "quant/zero": zero / total}


def code_flow(history: CodeHistory, params: dict[str, Array], specs: Specs, group: int
              ) -> tuple[CodeHistory, dict[str, Float[Array, ""]]]:
    """quant/flipped: share of codes that differ from the last call's; quant/oscillating: share that moved against the
    direction of their own last move. Costs two bytes per weight on the grid."""
    codes = codes_of(params, specs, group)
    flipped = oscillating = jnp.float32(0)
    total, moved = 0, {}
    for path, now in codes.items():
        step = jnp.sign(now - history.codes[path]).astype(jnp.int8)
        last = history.moved[path]
        flipped += jnp.sum(step != 0, dtype=jnp.float32)
        oscillating += jnp.sum(step * last < 0, dtype=jnp.float32)
        moved[path] = jnp.where(step != 0, step, last)
        total += now.size
    return CodeHistory(codes, moved), {"quant/flipped": flipped / total, "quant/oscillating": oscillating / total}
