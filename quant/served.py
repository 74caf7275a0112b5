"""What a weight becomes when it is served, inside the training forward.

Routed experts go to the INT4 grid, everything else to the dtype of the exported checkpoint. Because the forward
already sees these values, export changes nothing. Gradients pass straight through to the float32 masters.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from configs.param_spec import ParamSpec
from configs.schema import ModelConfig, QuantConfig
from quant import grid


@dataclass(frozen=True)
class Serving:
    """How weights are seen by the forward pass: the dtype of all of them, and the grid of the experts."""

    dtype: str = "bfloat16"
    grid: str = "none"
    group_size: int = 32

    @classmethod
    def of(cls, model: ModelConfig, quant: QuantConfig) -> Serving:
        return cls(dtype=model.dtype, grid=quant.grid, group_size=quant.group_size)

    @property
    def levels(self) -> int:
        """Largest code of the grid."""
        return grid.LEVELS[self.grid]


def grid_amount(quant: QuantConfig, step: Array) -> Float[Array, ""]:
    """Share of the grid in the forward weights at an optimizer step: 0, the ramp, then exactly 1."""
    if quant.grid == "none":
        return jnp.zeros((), jnp.float32)
    share = jnp.clip((step - quant.start_step + 1) / (quant.ramp_steps + 1), 0.0, 1.0).astype(jnp.float32)
    # Compiled, the division is a product with a reciprocal, whose last step need not be 1.
    return jnp.where(step >= settled_step(quant), jnp.float32(1), share)


def grid_share(quant: QuantConfig, step: int) -> float:
    """The same as a number: how the forward pass sees the weights after `step` optimizer steps."""
    return float(grid_amount(quant, jnp.int32(step)))


def settled_step(quant: QuantConfig) -> int | None:
    """The first optimizer step from which on `grid_amount` is 1; None without a grid."""
    return None if quant.grid == "none" else quant.start_step + quant.ramp_steps


def _straight_through(value: Array, master: Array) -> Array:
    """`value` forward, identity to `master` backward."""

    @jax.custom_vjp
    def through(value, master):
        return value

    through.defvjp(lambda value, master: (value, None), lambda _, g: (jnp.zeros_like(g), g))
    return through(jax.lax.stop_gradient(value), master)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Master:
    """A layer's master weights, part == stack[layer]. Gradients go to the part; a kernel reads the stack, because XLA would copy
    the part for it, and where nothing else reads the part, nobody cuts it out."""

    part: Float[Array, "..."]
    stack: Float[Array, "L ..."]
    layer: Int[Array, ""]


def _on_grid(w: Float[Array, "..."] | Master, axis: int, serving: Serving, platform: str) -> Float[Array, "..."]:
    """`grid.on_grid` of the masters by the fastest program for the platform that gives its numbers."""
    part, *where = (w.part, w.stack, w.layer) if isinstance(w, Master) else (w,)
    if platform == "hopper":
        from quant import grid_gpu  # Pallas takes longer to import than a CPU has use for

        if grid_gpu.takes(part.shape, axis, serving.group_size):
            stack, *layer = where or [jax.lax.stop_gradient(part)]
            return grid_gpu.on_grid(stack, axis, serving.group_size, serving.levels, *layer).astype(jnp.float32)
    return grid.on_grid(part.astype(jnp.float32), axis, serving.group_size, serving.levels)


def as_served(
    w: Float[Array, "..."] | Master, spec: ParamSpec, serving: Serving, amount: Float[Array, ""] | float, platform: str = "cpu"
) -> Float[Array, "..."]:
    """Forward value (float32) of a master weight; leading stacked axes of the spec may be sliced away. `platform`: of
    configs/platforms.py; every one gives the same numbers. A number for `amount` decides when the program is made; an array,
    even of a constant, may be hidden from the compiler (by jax.checkpoint), and masters are then read beside the grid."""
    master = (w.part if isinstance(w, Master) else w).astype(jnp.float32)
    value = master
    if serving.dtype == "bfloat16" and spec.served is None:
        value = grid.bf16_round(value)
    if spec.on_grid and serving.grid != "none":
        axis = spec.axis(spec.matrix.rows[0]) - len(spec.axes)
        on_grid = _on_grid(w, axis, serving, platform)
        if isinstance(amount, float) and amount in (0.0, 1.0):
            value = on_grid if amount else value
        else:
            value = jnp.where(amount >= 1, on_grid, jnp.where(amount > 0, value + amount * (on_grid - value), value))
    return _straight_through(value, master)
