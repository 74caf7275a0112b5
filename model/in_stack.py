"""An array of one layer that still lies among those of all layers, in decoding.

A loop over layers cuts every layer's arrays out of the stacks. XLA fuses that with products of its own; for a kernel of ours on
a GPU, and for a loop that picks experts on a CPU, it copies the part: all experts of a layer for every token, of which a token
needs a few. What picks experts by their number can as well pick them from those of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from quant.resident import Int4Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InStack:
    """stack[layer], such as [E, ...] of [L, E, ...]: it stands where that stood until `cut` asks for the array."""

    stack: Array | Int4Weight
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> InStack:
        return InStack(self.stack.reshape(len(self.stack), *shape), self.layer)

    def cut(self) -> Array | Int4Weight:
        return self.stack[self.layer]

    def among_all(self, expert_of: Int[Array, "P"]) -> tuple[Array | Int4Weight, Int[Array, "P"]]:
        """The experts of all layers as one [L * E, ...], and which of them are meant; nobody stays nobody."""
        held, every = len(self), len(self.stack) * len(self)
        numbers = jnp.where(expert_of < held, expert_of + self.layer * held, every)
        return jax.tree.map(lambda a: a.reshape(every, *a.shape[2:]), self.stack), numbers


def leave_in(stack: nnx.Module, module: nnx.Module, names: tuple[str, ...], layer: Int[Array, ""], dtype: str) -> None:
    """Those parameters of a layer's module become that layer of the stacked module's, uncut, where products take them as they
    are."""
    for name in names:
        values = getattr(stack, name).get_value()
        if isinstance(values, Int4Weight) or values.dtype == dtype:
            setattr(module, name, getattr(module, name).replace(InStack(values, layer)))
