"""What each query sees, as an interval of keys, and which tiles that leaves to work on."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where the document of each position begins; documents are contiguous."""
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(new, jnp.arange(segments.shape[1]), 0), axis=1)


class Intervals(NamedTuple):
    """Query s of row b sees the keys low[b, s] ... high[b, s], none where low > high."""

    low: Int[Array, "B S"]
    high: Int[Array, "B S"]

    @classmethod
    def of(cls, segments: Int[Array, "B T"], at: Int[Array, "S"], queries: int, keys: int) -> Intervals:
        """Causal within contiguous documents: from the start of a query's document to itself. Padding (document 0) sees
        nothing and neither do the queries and keys that are added behind up to these counts."""
        real = segments[:, at] > 0
        more = ((0, 0), (0, queries - len(at)))
        low = jnp.pad(jnp.where(real, document_starts(segments)[:, at], keys), more, constant_values=keys)
        high = jnp.pad(jnp.where(real, at, -1), more, constant_values=-1)
        return cls(low.astype(jnp.int32), high.astype(jnp.int32))

    def _tiles(self, queries: int, keys: int, T: int) -> tuple[Bool[Array, "B m n"], Bool[Array, "B m n"]]:
        """Tiles of queries x keys in which something is seen, and those in which all is."""
        B, S = self.low.shape
        low, high = (x.reshape(B, S // queries, queries) for x in (self.low, self.high))
        start = jnp.arange(T // keys) * keys
        end = start + keys - 1
        some = (jnp.min(low, -1)[..., None] <= end) & (jnp.max(high, -1)[..., None] >= start)
        every = (jnp.max(low, -1)[..., None] <= start) & (jnp.min(high, -1)[..., None] >= end)
        return some, every

    def keys_of_queries(self, queries: int, keys: int, T: int) -> Int[Array, "B m 4"]:
        """For each tile of so many queries the tiles of so many of the T keys to visit: `_spans`."""
        return _spans(*self._tiles(queries, keys, T))

    def queries_of_keys(self, queries: int, keys: int, T: int) -> Int[Array, "B n 4"]:
        """For each tile of keys the tiles of queries to visit."""
        return _spans(*(jnp.swapaxes(x, 1, 2) for x in self._tiles(queries, keys, T)))


def _spans(some: Bool[Array, "B m n"], every: Bool[Array, "B m n"]) -> Int[Array, "B m 4"]:
    """(first, inside, outside, end) for each of m tiles: first ... end - 1 are to be visited, and of these everything is
    seen in inside ... outside - 1."""
    n = some.shape[-1]
    index = jnp.arange(n, dtype=jnp.int32)
    end = jnp.max(jnp.where(some, index + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(some, index, n), axis=-1), end)
    inside = jnp.clip(jnp.min(jnp.where(every, index, n), axis=-1), first, end)
    outside = jnp.maximum(jnp.max(jnp.where(every, index + 1, 0), axis=-1), inside)
    # A hole among them (which contiguous documents do not have) would be left unmasked.
    outside = jnp.where(jnp.sum(every, axis=-1) == outside - inside, outside, inside)
    return jnp.stack([first, inside, outside, end], axis=-1)
