"""Post-training quantisation of stored weights: the baselines that training on the grid has to beat.

Results keep the stored layout, as float32 grid values, so that one forward pass evaluates every arm. An arm is run
with grid "none": its experts are on their grid already.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float

from configs.param_spec import ParamSpec, Specs
from quant.codecs import CODECS, Codec


def group_axis(spec: ParamSpec) -> int:
    """Position of the grouped (input) axis, counted from the end."""
    return spec.axis(spec.matrix.rows[0]) - len(spec.axes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _fake(w: Array, codec: Codec, axis: int, group: int) -> Array:
    return codec.fake(w, axis, group)


def round_to_nearest(params: dict[str, Float[Array, "..."]], specs: Specs, group: int, grid: str = "kimi7") -> dict[str, Array]:
    """The parameters with every array on the grid replaced by its nearest grid values, float32.

    `grid` names a codec of quant/codecs.py: kimi7 (absmax/7) or ct75 (absmax/7.5).
    """
    return {path: _fake(w, CODECS[grid], group_axis(specs[path]), group) if specs[path].on_grid else w
            for path, w in params.items()}
