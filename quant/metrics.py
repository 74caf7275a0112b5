"""How many codes move during training, and how many move back; quant/error.py has the distance to the grid.

Everything here is traced: call it inside the train step or a jitted function of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from configs.param_spec import Specs
from quant import grid
from quant.coverage import group_axis
from quant.grid import LEVELS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodeHistory:
    """codes: the codes after the last step; moved: the direction (-1, 0, 1) in which a code last moved."""

    codes: dict[str, Int8[Array, "..."]]
    moved: dict[str, Int8[Array, "..."]]


def codes_of(params: dict[str, Array], specs: Specs, group: int, levels: int = LEVELS["int4"]) -> dict[str, Int8[Array, "..."]]:
    """Codes of every parameter on the grid."""
    return {path: grid.quantize(params[path], group_axis(spec), group, levels)[0] for path, spec in specs.items() if spec.on_grid}


def code_flow(
    history: CodeHistory, params: dict[str, Array], specs: Specs, group: int, levels: int = LEVELS["int4"]
) -> tuple[CodeHistory, dict[str, Float[Array, ""]]]:
    """quant/flipped: share of codes that differ from the history's; quant/oscillating: share that moved against the
    direction of their own last move that was seen. Costs two bytes per weight on the grid."""
    codes = codes_of(params, specs, group, levels)
    flipped = oscillating = jnp.float32(0)
    total, moved = 0.0, {}
    for path, now in codes.items():
        step = jnp.sign(now - history.codes[path]).astype(jnp.int8)
        last = history.moved[path]
        flipped += jnp.sum(step != 0, dtype=jnp.float32)
        oscillating += jnp.sum(step * last < 0, dtype=jnp.float32)
        moved[path] = jnp.where(step != 0, step, last)
        total += float(now.size)  # too many for an int32
    return CodeHistory(codes, moved), {"quant/flipped": flipped / total, "quant/oscillating": oscillating / total}
