"""The next token from logits: greedy, or drawn at a temperature from the nucleus (top-p) and above min-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from configs.schema import require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token. top_p keeps the smallest set of tokens with that much probability
    (arXiv 1904.09751). min_p keeps tokens at least that fraction as likely as the best one (arXiv 2407.01082)."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def check(self) -> Sampling:
        require(self.temperature >= 0, f"temperature must be at least 0, not {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], not {self.min_p}")
        require(-(2**31) <= self.seed < 2**31, f"seed must lie in [-2^31, 2^31), not {self.seed}")
        return self


GREEDY = Sampling()


def kept(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, -inf where top-p or min-p excludes a token. The best token always stays."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)  # at 0 no temperature makes an infinity of it, which is no probability
    logits = (logits_BV - best_B1) / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    order = jnp.argsort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    keep = (jnp.cumsum(probs, axis=-1) - probs < sampling.top_p) & (probs >= sampling.min_p * probs[:, :1])
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


def choose(logits_BV: Float[Array, "B V"], at_B: Int[Array, "B"], sampling: Sampling, greedy: bool) -> Int[Array, "B"]:
    """Token of every row. The random numbers belong to (seed, row, position): a row's text does not depend on how
    long its neighbours run."""
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key = jax.random.key(sampling.seed)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(jnp.arange(len(at_B)), at_B)
    return jax.vmap(jax.random.categorical)(keys, kept(logits_BV, sampling)).astype(jnp.int32)


class Budget(NamedTuple):
    """How many tokens a reply may think: after so many of them `end` is put in place of whatever was chosen, unless that is
    `calls`, the beginning of a call section, which ends a thought too."""

    begin: int = -1
    end: int = -1
    calls: int = -1
    tokens: int = 1 << 30


UNLIMITED = Budget()

OUTSIDE = -1
"""What `spend` counts before a row has thought: tokens of thought are counted up while it thinks, and are kept as OUTSIDE minus
their number while it does not."""


def spend(budget: Budget, thought_B: Int[Array, "B"], token_B: Int[Array, "B"]) -> tuple[Array, Array]:
    """The token under the budget, and the count behind it; `begin` and `end` are not counted, and a second thought goes on where
    the first one's count ended."""
    inside_B, spent_B = thought_B >= 0, jnp.where(thought_B >= 0, thought_B, OUTSIDE - thought_B)
    token_B = jnp.where(inside_B & (spent_B >= budget.tokens) & (token_B != budget.calls), budget.end, token_B)
    left_B = (token_B == budget.end) | (token_B == budget.calls)
    begun_B = token_B == budget.begin
    thinks_B = (inside_B | begun_B) & ~left_B
    spent_B += inside_B & ~left_B & ~begun_B
    return token_B, jnp.where(thinks_B, spent_B, OUTSIDE - spent_B)
