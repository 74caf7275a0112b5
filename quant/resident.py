"""Weights that stay at four bits in device memory: `jnp.int4` codes and bf16 scales, 4.5 bits per weight.

`.nbytes` of an int4 array counts a byte per element; the device stores half of one (docs/quantization.md), which
`compiled.memory_analysis()` shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int4

from quant import grid


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4Weight:
    """A stored array on the grid. `axis` is the grouped one, counted from the end, so that leading axes can be scanned
    or gathered away. It stands where an array stood: `w[...]` and `w.astype(dtype)` work, the latter unpacks."""

    codes: Int4[Array, "..."]
    scales: BFloat16[Array, "..."]
    axis: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self):
        return self.codes.dtype

    def __getitem__(self, index) -> Int4Weight:
        """Index or gather leading axes; both parts have them."""
        return Int4Weight(self.codes[index], self.scales[index], self.axis, self.group)

    def __len__(self) -> int:
        return len(self.codes)

    def reshape(self, *shape: int) -> Int4Weight:
        """Merge or split axes after the grouped one; those before and the grouped one stay."""
        at = self.ndim + self.axis
        codes = self.codes.reshape(shape)
        if codes.shape[: at + 1] != self.shape[: at + 1]:
            raise ValueError(f"{self.shape} cannot become {codes.shape}: groups lie along axis {at}")
        scales = self.scales.reshape(*self.scales.shape[: at + 1], *codes.shape[at + 1 :])
        return Int4Weight(codes, scales, at - codes.ndim, self.group)

    def astype(self, dtype) -> Float[Array, "..."]:
        """The weights, bf16(code * scale), in `dtype`."""
        return grid.dequantize(self.codes, self.scales.astype(jnp.float32), self.axis, self.group).astype(dtype)


@partial(jax.jit, static_argnums=(1, 2))
def to_int4(w: Float[Array, "..."], axis: int, group: int) -> Int4Weight:
    """Weights, or masters, on the grid at four bits."""
    codes, scales = grid.quantize(w, axis, group)
    return Int4Weight(codes.astype(jnp.int4), scales.astype(jnp.bfloat16), axis, group)


def bits_per_weight(group: int) -> float:
    """4 for the code, 16 for the group's scale."""
    return 4 + 16 / group
