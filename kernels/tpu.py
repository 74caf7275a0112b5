"""What our kernels for TPUs share, in the network and the optimizer."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LANES = 128
"""Width of a register: sizes of tiles are multiples of it."""


def dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The sum over one axis of each matrix, in float32; float32 operands are multiplied in full, not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
