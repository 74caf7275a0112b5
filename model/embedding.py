"""The input embedding on one device or many."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model.call import Call


def lookup(table: nnx.Param, tokens_BS: Int[Array, "B S"], call: Call) -> Float[Array, "B S D"]:
    """The tokens' rows in the compute dtype; their gradient is summed in float32.

    The table stays where it is: devices that hold different columns send each other their tokens (integers) and then
    the columns of those rows, B*S*D values each way instead of V*D; devices that hold different rows of the table add
    what they found.
    """
    shards, part = call.shards, call.part(table)
    (of_rows, of_columns) = shards.stored(table.spec)
    ids = shards.gather_axis(tokens_BS[None], of_columns, 0)
    ids -= shards.index(*of_rows) * len(part)
    found = jnp.where(((ids >= 0) & (ids < len(part)))[..., None], part[jnp.clip(ids, 0, len(part) - 1)], 0)
    found = found.astype(call.dtype)
    if of_columns:
        found = lax.all_to_all(found, of_columns, 0, 3, tiled=True)
    return shards.total(found[0], of_rows)
