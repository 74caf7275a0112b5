"""What a layer is told besides its input, and what it reports besides its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.in_stack import InStack
from model.shards import ONE_DEVICE, Shards
from quant.coverage import group_axis
from quant.packed_gather import gather_on_grid
from quant.resident import Int4Weight
from quant.served import Master, Serving, as_served


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """The setting of one forward pass.

    positions   [B, S] int, restart with every packed document
    segments    [B, S] int, 0 where a row is padded, else the number of the document within the row
    amount      scalar, share of the grid in the expert weights (quant/served.py)
    serving     how weights are rounded; dtype: of activations and matmul inputs
    platform    of the mesh the program is compiled for (configs/platforms.py); the registries choose by it
    remat       policy of model/remat.py
    unroll      whether the MoE layers are written out instead of looped over
    shards      what this device holds of every array, [B, S] included
    transport   how tokens reach experts on other devices, an entry of model/transport/
    settled     whether amount is known to be 1: weights on the grid then travel as their codes and scales, and nothing else of
                their masters is read
    """

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    amount: Float[Array, ""]
    serving: Serving = field(metadata={"static": True})
    dtype: str = field(default="float32", metadata={"static": True})
    platform: str = field(default="cpu", metadata={"static": True})
    remat: str = field(default="none", metadata={"static": True})
    unroll: bool = field(default=False, metadata={"static": True})
    shards: Shards = field(default=ONE_DEVICE, metadata={"static": True})
    transport: str = field(default="auto", metadata={"static": True})
    settled: bool = field(default=False, metadata={"static": True})

    def weight(self, param: nnx.Param, joined: bool = False) -> Array | Int4Weight | InStack:
        """A parameter as the forward pass sees it: on its served grid, in the compute dtype, gathered in that dtype, or
        packed, from the devices that store its parts. Heads, hidden widths and experts that this device works on stay
        parts. Weights that are held at four bits stay so: the product unpacks what it uses.

        `joined`: the last two axes as one, as products take gate and up."""
        stored, spec = param.get_value(), param.spec
        if isinstance(stored, Int4Weight | InStack):
            return stored.reshape(*stored.shape[:-2], -1) if joined else stored
        gather = partial(self.shards.gather, spec=spec, joined=joined)
        if self.settled and spec.on_grid and self.shards.gathers(spec):
            axis, serving = group_axis(spec), self.serving
            part = stored.part if isinstance(stored, Master) else stored
            return gather_on_grid(part, axis, serving.group_size, self.dtype, gather, serving.levels)
        return gather(self.part(param).astype(self.dtype))

    def exact_weight(self, param: nnx.Param) -> Array:
        """The same in float32, for norms and the router."""
        return self.shards.gather(self.part(param), param.spec)

    def part(self, param: nnx.Param) -> Array:
        """The same in float32, of the part that this device stores. Groups of the grid never cross parts."""
        return as_served(param.get_value(), param.spec, self.serving, 1.0 if self.settled else self.amount, self.platform)


def reduced_by(reduce: Callable, neutral: float) -> Any:
    """A field of measurements, the one way to combine it over microbatches and shards, and that way's neutral value."""
    return field(metadata={"reduce": reduce, "neutral": neutral})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerAux:
    """Measured by every layer. Scanned layers keep their own entries: nothing is ever reduced over layers."""

    max_logit: Float[Array, "... H"] = reduced_by(jnp.maximum, -jnp.inf)
    """Largest scaled, unmasked attention logit of each head (QK-Clip's statistic)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEAux:
    """Measured by an MoE layer."""

    expert_counts: Float[Array, "... E"] = reduced_by(jnp.add, 0.0)
    """Tokens sent to each expert; padding does not count."""
    balance_loss: Float[Array, "..."] = reduced_by(jnp.add, 0.0)
    """Sequence-wise balance loss, summed over rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelAux:
    """Everything measured in a forward pass, per layer: attention for all L layers, routing for the MoE ones."""

    attention: LayerAux
    moe: MoEAux
    teacher_kl: Float[Array, ""] = reduced_by(jnp.add, 0.0)
    """sum(weight * KL(teacher || this network)) over tokens; 0 until a loss with a teacher fills it in."""


def over_devices(aux, axes: tuple[str, ...]):
    """An aux tree of this device's tokens to one of all devices' along these mesh axes, by the reducer of each field."""
    across = {jnp.add: jax.lax.psum, jnp.maximum: jax.lax.pmax}

    def field_of(f, x):
        return across[f.metadata["reduce"]](x, axes) if "reduce" in f.metadata else over_devices(x, axes)

    return type(aux)(**{f.name: field_of(f, getattr(aux, f.name)) for f in fields(aux)}) if axes else aux


def combine(a, b):
    """Combine two aux trees of different tokens (microbatches, shards) by the reducer each field declares."""
    if not hasattr(a, "__dataclass_fields__"):
        raise TypeError(f"{type(a).__name__} declares no reducers")
    out = {}
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        out[f.name] = f.metadata["reduce"](x, y) if "reduce" in f.metadata else combine(x, y)
    return type(a)(**out)


def nothing_measured(shapes):
    """The neutral element of `combine` for an aux tree of these shapes."""
    out = {}
    for f in fields(shapes):
        shape = getattr(shapes, f.name)
        out[f.name] = (
            jnp.full(shape.shape, f.metadata["neutral"], shape.dtype) if "reduce" in f.metadata else nothing_measured(shape)
        )
    return type(shapes)(**out)
