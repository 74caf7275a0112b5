"""Text from weights: prompts fill the latent cache (model/latent_cache.py), then one token per row and step.

A `Decoder` keeps the cache between replies. A prompt that goes on where its row stands costs only its new tokens, so
a conversation of hundreds of tool calls is read once. Sizes are rounded up to a few per octave, so that repeated calls
reuse the compiled program.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs.schema import ModelConfig, require
from model.call import Call
from model.decode.sampling import GREEDY, OUTSIDE, UNLIMITED, Budget, Sampling, choose, spend
from model.decode.served_params import SERVED
from model.latent_cache import BLOCK
from model.transformer import bind

CHUNK = 256
"""New tokens of a row that go through the network together when a prompt goes on: bounds the logits in memory."""


@dataclass(frozen=True)
class Program:
    """What a compiled decoder depends on besides shapes."""

    cfg: ModelConfig
    dtype: str
    platform: str
    greedy: bool
    vocab_size: int | None = None
    """Of the tokenizer. A network may have room for more ids, of which none is ever chosen."""

    def call(self, positions: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Call:
        return Call(positions, segments, jnp.float32(0), SERVED, dtype=self.dtype, platform=self.platform)


@dataclass
class Stats:
    """Filled in by `Decoder.stream` while it runs. Seconds from its start; what a shape's first call takes includes its
    compilation, so the second token's time stands apart: from there on nothing is compiled."""

    prompt_tokens: int = 0
    read_tokens: int = 0
    """Of the prompt, those that were not in the cache yet."""
    new_tokens: int = 0
    first_token_s: float = 0.0
    second_token_s: float = 0.0
    total_s: float = 0.0


def tokens_per_s(*replies: Stats) -> float:
    """Of decoding: tokens after each reply's second, over the time they took."""
    steady = [r for r in replies if r.new_tokens > 2]
    seconds = sum(r.total_s - r.second_token_s for r in steady)
    return sum(r.new_tokens - 2 for r in steady) / seconds if seconds > 0 else float("nan")


def bucket(n: int, least: int) -> int:
    """`n` rounded up to a multiple of `least` and to one of four sizes per octave."""
    step = max(least, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def room_for(positions: int) -> int:
    """Cache length for so many positions: a power of two up to a block, then blocks."""
    return 1 << max(positions - 1, 15).bit_length() if positions <= BLOCK else bucket(positions, BLOCK)


def prefill(
    params: dict[str, Array], tokens_BS: Int[Array, "B S"], lengths_B: Int[Array, "B"], cache_len: int, program: Program
) -> tuple[Float[Array, "B V"], Float[Array, "L B T R+rope"]]:
    """Logits after each row's last prompt token, and the latent cache with room for `cache_len` positions.

    Prompts are padded on the right; what the padding leaves in the cache is overwritten before it can be seen.
    """
    B, S = tokens_BS.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    call = program.call(positions, (positions < lengths_B[:, None]).astype(jnp.int32))
    network = bind(program.cfg, params)
    hidden_BSD, _, latents = network(tokens_BS, call)
    last_BD = jnp.take_along_axis(hidden_BSD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    return network.logits(last_BD, call)[:, : program.vocab_size], jnp.pad(latents, ((0, 0), (0, 0), (0, cache_len - S), (0, 0)))


def extend(
    params: dict[str, Array], tokens_BS: Int[Array, "B S"], cache_LBTR: Array, positions_BS: Int[Array, "B S"], program: Program
) -> tuple[Float[Array, "B V"], Array]:
    """Logits after the last column, and the cache with the tokens at these positions. A position of T or more is
    padding, which leaves no trace; short rows have theirs on the left."""
    inside = positions_BS < cache_LBTR.shape[2]
    network = bind(program.cfg, params)
    call = program.call(positions_BS, inside.astype(jnp.int32))
    hidden_BSD, cache_LBTR = network.decode(tokens_BS, cache_LBTR, call)
    return network.logits(hidden_BSD[:, -1], call)[:, : program.vocab_size], cache_LBTR


def _reply(params, logits_BV, cache_LBTR, lengths_B, limits_B, stop_ids, sampling, budget, *, room: int, program: Program):
    """[B, room] tokens, how many each row has, and the cache; a row ends at a stop token or at its limit (0: it only
    pads the batch), and the loop when every row has ended."""
    B, T = len(lengths_B), cache_LBTR.shape[2]
    first, thought = spend(budget, jnp.full(B, OUTSIDE), choose(logits_BV, lengths_B, sampling, program.greedy))

    def ended(token_B, n):
        return jnp.any(token_B[:, None] == stop_ids, axis=1) | (n >= limits_B)

    def unfinished(state):
        return ~jnp.all(state[4])

    def step(state):
        n, token, thought, cache, done, out, count = state
        at = jnp.where(done, T, lengths_B + n - 1)
        logits, cache = extend(params, token[:, None], cache, at[:, None], program)
        token, thought = spend(budget, thought, choose(logits, lengths_B + n, sampling, program.greedy))
        return n + 1, token, thought, cache, done | ended(token, n + 1), out.at[:, n].set(token), count + ~done

    out = jnp.zeros((B, room), jnp.int32).at[:, 0].set(first)
    state = (jnp.int32(1), first, thought, cache_LBTR, ended(first, 1), out, jnp.ones(B, jnp.int32))
    _, _, _, cache_LBTR, _, out, count = jax.lax.while_loop(unfinished, step, state)
    return out, count, cache_LBTR


_prefill = jax.jit(prefill, static_argnames=("cache_len", "program"))
_extend = jax.jit(extend, static_argnames=("program",), donate_argnums=(2,))
_loop = jax.jit(_reply, static_argnames=("room", "program"), donate_argnums=(2,))


@partial(jax.jit, static_argnames=("greedy",))
def _choose(logits_BV, at_B, sampling, budget, thought_B, *, greedy: bool):
    return spend(budget, thought_B, choose(logits_BV, at_B, sampling, greedy))


class Decoder:
    """Rows that are continued again and again.

    `params` are as served (model/decode/served_params.py). The cache grows as needed; `positions` says how long a row is
    expected to become, which saves growing and compiling again. Raises ConfigError on an empty prompt or an unknown
    token id.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict[str, Array],
        rows: int,
        *,
        stop_ids: tuple[int, ...],
        dtype: str,
        platform: str,
        vocab_size: int | None = None,
        sampling: Sampling = GREEDY,
        positions: int = 0,
    ):
        self.sampling = sampling.check()
        self.program = Program(cfg, dtype, platform, sampling.temperature == 0, vocab_size)
        self.params, self.rows, self.stop_ids, self.positions = params, bucket(rows, 1), stop_ids, positions
        self.cache: Array | None = None
        self.cached: list[list[int]] = [[] for _ in range(self.rows)]
        """Token ids whose latents stand in each row of the cache."""

    def reply(
        self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int, budget: Budget = UNLIMITED
    ) -> dict[int, list[int]]:
        """row -> the continuation of its prompt: all rows together on the device, each up to and including its stop
        token, or without one at `max_new_tokens`. Rows without a prompt stay as they are."""
        lengths, limits = np.ones(self.rows, np.int32), np.zeros(self.rows, np.int32)
        for row, prompt in prompts.items():
            lengths[row], limits[row] = len(prompt), max_new_tokens
        logits, _ = self._read(prompts, max_new_tokens)
        stops = np.asarray(self.stop_ids or (-1,), np.int32)
        out, count, self.cache = _loop(
            self.params,
            logits,
            self.cache,
            lengths,
            limits,
            stops,
            self.sampling,
            budget,
            room=bucket(max_new_tokens, 16),
            program=self.program,
        )
        out, count = jax.device_get((out, count))
        replies = {row: out[row, : count[row]].tolist() for row in prompts}
        for row, ids in replies.items():
            self.cached[row] += ids[:-1]
        return replies

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, budget: Budget = UNLIMITED, stats: Stats | None = None
    ) -> Iterator[int]:
        """The tokens of `reply` for row 0, each as soon as it is known; `stats` is kept up to date."""
        stats = Stats() if stats is None else stats
        start, thought = time.perf_counter(), np.full(self.rows, OUTSIDE, np.int32)
        logits, stats.read_tokens = self._read({0: prompt}, max_new_tokens)
        stats.prompt_tokens = len(prompt)
        for n in range(max_new_tokens):
            at = np.full(self.rows, self.cache.shape[2], np.int32)  # other rows stay as they are
            at[0] = len(prompt) + n
            token, thought = _choose(logits, at, self.sampling, budget, thought, greedy=self.program.greedy)
            value = int(token[0])
            stats.new_tokens, stats.total_s = n + 1, time.perf_counter() - start
            if n == 0:
                stats.first_token_s = stats.total_s
            if n == 1:
                stats.second_token_s = stats.total_s
            yield value
            if value in self.stop_ids:
                return
            logits, self.cache = _extend(self.params, token[:, None], self.cache, at[:, None], self.program)
            self.cached[0].append(value)

    def _read(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: int) -> tuple[Array, int]:
        """Logits after the prompts, whose tokens stand in the cache afterwards; and how many tokens were read."""
        require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {max_new_tokens}")
        for row, prompt in prompts.items():
            require(len(prompt) > 0, f"prompt {row} is empty; it needs at least one token")
        # The last token is read again even if it is cached: its logits are wanted.
        known = {row: min(shared_prefix(self.cached[row], prompt), len(prompt) - 1) for row, prompt in prompts.items()}
        new = {row: list(prompt[known[row] :]) for row, prompt in prompts.items()}
        vocab = self.program.cfg.vocab_size
        for row, ids in new.items():
            require(min(ids) >= 0 and max(ids) < vocab, f"prompt {row} has a token id outside [0, {vocab})")
        longest = max(map(len, prompts.values())) + bucket(max_new_tokens, 16)
        logits = self._append(new, known, longest) if self.cache is not None else self._begin(new, longest)
        for row, prompt in prompts.items():
            self.cached[row] = list(prompt)
        return logits, sum(map(len, new.values()))

    def _begin(self, prompts: dict[int, list[int]], longest: int) -> Array:
        width = bucket(max(map(len, prompts.values())), 16)
        tokens, lengths = np.zeros((self.rows, width), np.int32), np.ones(self.rows, np.int32)
        for row, prompt in prompts.items():
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        room = room_for(max(longest, self.positions, width))
        logits, self.cache = _prefill(self.params, tokens, lengths, room, self.program)
        return logits

    def _append(self, new: dict[int, list[int]], known: dict[int, int], longest: int) -> Array:
        if longest > self.cache.shape[2]:
            more = room_for(max(longest, 2 * self.cache.shape[2])) - self.cache.shape[2]
            self.cache = jnp.pad(self.cache, ((0, 0), (0, 0), (0, more), (0, 0)))
        width = bucket(max(map(len, new.values())), 16)
        tokens = np.zeros((self.rows, width), np.int32)
        positions = np.full((self.rows, width), self.cache.shape[2], np.int32)
        for row, ids in new.items():
            tokens[row, width - len(ids) :] = ids
            positions[row, width - len(ids) :] = np.arange(known[row], known[row] + len(ids))
        first = width % CHUNK
        for at in [*([0] if first else []), *range(first, width, CHUNK)]:
            part = slice(at, first if at < first else at + CHUNK)
            logits, self.cache = _extend(self.params, tokens[:, part], self.cache, positions[:, part], self.program)
        return logits


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differ[0]) if len(differ) else length
