"""Weights prepared once for serving, so that decoding does not round or quantise them again for every token."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.param_spec import ParamSpec, Specs
from quant.served import Serving, as_served

SERVED = Serving(dtype="float32", grid="none")
"""What `Call.serving` must be with prepared weights: they are taken as they are."""


def serve(
    params: dict[str, Array], specs: Specs, serving: Serving, amount: Float[Array, ""] | float, dtype: str
) -> dict[str, Array]:
    """The forward values of all masters. With `SERVED` they give the very numbers of the masters with `serving`.

    `amount` is 0 for plain weights, 1 for the grid. Weights are kept in bfloat16 where that loses nothing the forward
    pass would have kept: it computes in bfloat16, and the served value is a bfloat16.
    """
    return _serve(params, specs=tuple(specs.items()), serving=serving, amount=jnp.float32(amount), dtype=dtype)


@partial(jax.jit, static_argnames=("specs", "serving", "dtype"))
def _serve(params, specs: tuple[tuple[str, ParamSpec], ...], serving: Serving, amount: Array, dtype: str):
    def one(path: str, spec: ParamSpec) -> Array:
        value = as_served(params[path], spec, serving, amount)
        narrow = dtype == serving.dtype == "bfloat16" and spec.served is None
        return value.astype(jnp.bfloat16) if narrow else value

    return {path: one(path, spec) for path, spec in specs}
