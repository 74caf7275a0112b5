"""Layers declare their parameters here: the only way an array, and a row of the ParamSpec table, comes into being."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from configs.param_spec import HFTensor, ParamSpec


class Declare:
    """Hands out `nnx.Param`s for one place in the network and writes their specs into the shared table.

    Values are abstract (`jax.ShapeDtypeStruct`): real arrays are made from the table, on their devices, by
    train/state.py. `layers` are the indices of the network layers this place stands for; `stacked` puts them on a
    leading "layers" axis, which `jax.lax.scan` slices away again.
    """

    def __init__(
        self, table: dict[str, ParamSpec], path: str = "", hf: str = "", layers: tuple[int, ...] = (), stacked: bool = False
    ):
        self.table, self.path, self.hf, self.layers, self.stacked = table, path, hf, layers, stacked

    def at(self, name: str, hf: str = "") -> Declare:
        """A place below this one; `hf` continues the Hugging Face prefix."""
        return Declare(self.table, f"{self.path}{name}.", self.hf + hf, self.layers, self.stacked)

    def over_layers(self, layers: tuple[int, ...], hf: str, stacked: bool) -> Declare:
        """The same place, standing for network layers."""
        return Declare(self.table, self.path, self.hf + hf, layers, stacked)

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, hf: str | tuple[HFTensor, ...], **spec
    ) -> nnx.Param:
        """Declare one parameter; `hf` is a name below the prefix, or tensors with names below it."""
        tensors = (HFTensor(hf, transposed=spec.get("matrix") is not None),) if isinstance(hf, str) else hf
        tensors = tuple(HFTensor(self.hf + t.name, t.index, t.transposed) for t in tensors)
        if self.stacked:
            shape, axes = (len(self.layers), *shape), ("layers", *axes)
        path = self.path + name
        if path in self.table:
            raise ValueError(f"parameter {path} is declared twice")
        self.table[path] = ParamSpec(shape=shape, axes=axes, hf=tensors, layers=self.layers, **spec)
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), spec=self.table[path])
