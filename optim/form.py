"""Which form of Newton-Schulz a matrix of a given shape takes on a given platform. Chosen from the mesh, statically."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from configs import platforms
from optim.gram import cheaper, gram_flops, gram_newton_schulz, guarded, segments_for
from optim.newton_schulz import Coefficients, newton_schulz, standard_flops
from optim.symmetric import implementation

GRAM_DTYPE = {"gpu": "float16", "hopper": "float16"}
"""Operands of the Gram form where they are not the carrier's. After the division by the norm all values are small, so float16's
range suffices and its three extra bits allow fewer restarts; a TPU multiplies no float16."""


@dataclass(frozen=True)
class Form:
    """segments None: the plain iteration. Otherwise the Gram form with these restarts, its products by `product` of
    optim/symmetric.py."""

    coeffs: Coefficients
    segments: tuple[int, ...] | None
    dtype: str
    product: str

    def __call__(self, x: Array) -> Array:
        """[..., m, n] in the carrier dtype to its orthogonal factor in the same."""
        if self.segments is None:
            return newton_schulz(x, self.coeffs, x.dtype)
        if self.dtype == "float32":
            return gram_newton_schulz(x, self.coeffs, self.segments, jnp.float32, self.product)
        return guarded(x, self.coeffs, self.segments, jnp.dtype(self.dtype), x.dtype, self.product)

    def flops(self, m: int, n: int) -> int:
        if self.segments is None:
            return standard_flops(m, n, len(self.coeffs))
        return gram_flops(m, n, self.segments, self.product)

    def describe(self) -> str:
        if self.segments is None:
            return f"plain {self.dtype}"
        halves = f", halves by {self.product}" if self.product != "full" else ""
        return f"gram {'+'.join(map(str, self.segments))} {self.dtype}{halves}"


def platform_of(mesh: Mesh | None) -> str:
    """The mesh says where the program will run; the machine that compiles it may be another one."""
    return platforms.platform_of(mesh.devices.flat[0]) if mesh is not None else "cpu"


def carrier_dtype(platform: str, compute_dtype: str = "float32") -> str:
    """What matrices are stored and sent as around the iteration: bfloat16, but on a CPU what the run computes in, because that
    is what this CPU multiplies faster."""
    return compute_dtype if platform == "cpu" else "bfloat16"


def choose_form(m: int, n: int, coeffs: Coefficients, platform: str, compute_dtype: str = "float32") -> Form:
    """The cheapest safe form for an m x n matrix."""
    product = implementation(platform, min(m, n), max(m, n))
    carrier = carrier_dtype(platform, compute_dtype)
    dtype = GRAM_DTYPE.get(platform, carrier)
    segments = segments_for(coeffs, dtype)
    if cheaper(m, n, segments, product):
        return Form(coeffs, segments, dtype, product)
    return Form(coeffs, None, carrier, "full")
