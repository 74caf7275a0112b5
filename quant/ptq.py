"""Post-training quantisation of stored weights: the baselines that training on the grid has to beat.

A result holds codes and scales in the stored layout. `fake` puts their values back among the parameters, so that one
forward pass evaluates every arm (with grid "none": the experts are on their grid already); `quantizer` hands the same
codes to the exporter, so that every arm can be written into the same file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.param_spec import Specs
from quant import grid
from quant.calibration import Calibration, GridSpec, expert_matrices, restore_matrices
from quant.codecs import CODECS, Codec, Encoded
from quant.coverage import group_axis
from quant.gptq import gptq
from quant.layout import Slot

Params = Mapping[str, Float[Array, "..."]]


@dataclass(frozen=True)
class Quantized:
    """One arm. `codes` and `scales` by path, in stored layout; `folded` are plain parameters that the method changed
    (AWQ's norms, routers, shared experts), and `undo` the factors that bring its values back to the basis of the
    unquantised weights; `notes` say what fell back to plain rounding and why."""

    codes: dict[str, Array]
    scales: dict[str, Array]
    group: int
    folded: dict[str, Array] = field(default_factory=dict)
    undo: dict[str, Array] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fake(self, params: Params, specs: Specs) -> dict[str, Array]:
        """The parameters with every array on the grid replaced by its values, float32."""
        out = {**params, **self.folded}
        for path, codes in self.codes.items():
            out[path] = _values(codes, self.scales[path], group_axis(specs[path]), self.group)
        return out

    def effective(self, specs: Specs) -> dict[str, Array]:
        """Values of the arrays on the grid, comparable weight by weight to the unquantised ones."""
        return {
            path: _values(codes, self.scales[path], group_axis(specs[path]), self.group) * self.undo.get(path, 1.0)
            for path, codes in self.codes.items()
        }

    def quantizer(self):
        """For export_model: each projection's codes and scales from this table."""

        def lookup(slot: Slot, weight: np.ndarray, group: int) -> Encoded:
            return tuple(slot.to_hf(np.asarray(table[slot.path][slot.block])) for table in (self.codes, self.scales))

        return lookup


_values = jax.jit(grid.dequantize, static_argnums=(2, 3))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _encode(w: Array, codec: Codec, axis: int, group: int) -> Encoded:
    return codec.quantize(w, axis, group)


def nearest(params: Params, specs: Specs, group: int, codec: str = "kimi7") -> Quantized:
    """Every weight by itself. `codec` names a rule of quant/codecs.py: kimi7 (absmax/7), ct75 (absmax/7.5), mse,
    mse_signed or hqq (searched scales), int3 (three bits)."""
    codes, scales = {}, {}
    for path, spec in specs.items():
        if spec.on_grid:
            codes[path], scales[path] = _encode(params[path], CODECS[codec], group_axis(spec), group)
    return Quantized(codes, scales, group)


def gptq_experts(params: Params, specs: Specs, group: int, calibration: Calibration, *, codec: str = "mse") -> Quantized:
    """GPTQ (arXiv 2210.17323) on every expert with the Hessian of the tokens routed to it.

    Scales are fixed beforehand by `codec`; columns are taken in order of falling Hessian diagonal. An expert with fewer
    tokens than inputs has a singular Hessian and is rounded to nearest; the notes count those.
    """
    codes, scales, notes = {}, {}, []
    for path, spec in specs.items():
        if not spec.on_grid:
            continue
        hessians, counts = calibration.hessians[path], calibration.counts
        shape = GridSpec.of(spec)
        q, s = [], []
        for layer in range(len(hessians)):
            w = expert_matrices(params[path][layer], shape)
            starting, layer_scales = _encode(w, CODECS[codec], -1, group)
            solved = gptq(w, hessians[layer], layer_scales, group, CODECS[codec].low, CODECS[codec].high)
            enough = jnp.asarray(counts[layer] >= w.shape[-1])
            q.append(restore_matrices(jnp.where(enough[:, None, None], solved, starting), shape))
            s.append(restore_matrices(layer_scales, shape))
        codes[path], scales[path] = jnp.stack(q), jnp.stack(s)
        few = int((np.asarray(counts) < spec.shape[group_axis(spec)]).sum())
        notes.append(f"{path}: {few} of {np.size(counts)} experts saw fewer tokens than inputs and were rounded to nearest")
    return Quantized(codes, scales, group, notes=(calibration.summary(), *notes))
