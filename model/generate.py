"""Text from weights: prefill the latent cache with the prompts, then one token per row and step.

The cache holds kv_lora_rank + qk_rope_head_dim values per token and layer (model/mla.py), nothing per head.
Sizes are rounded up to a few per octave, so that repeated calls reuse the compiled program.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs.schema import ModelConfig, require
from model.call import Call
from model.sampling import Sampling, choose
from model.served_params import SERVED, serve
from model.transformer import bind, param_specs
from quant.served import Serving


@dataclass(frozen=True)
class Program:
    """What a compiled decoder depends on besides shapes."""

    cfg: ModelConfig
    dtype: str
    platform: str
    greedy: bool

    def call(self, positions: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Call:
        return Call(positions, segments, jnp.float32(0), SERVED, dtype=self.dtype, platform=self.platform)


@dataclass
class Stats:
    """Filled in by `stream` while it runs. Seconds; the first call of a shape includes its compilation."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of decoding: tokens after the first, over the time they took."""
        decoding = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / decoding if self.new_tokens > 1 and decoding > 0 else float("nan")


def bucket(n: int, least: int) -> int:
    """`n` rounded up to a multiple of `least` and to one of four sizes per octave."""
    step = max(least, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def prefill(params: dict[str, Array], tokens_BS: Int[Array, "B S"], lengths_B: Int[Array, "B"], cache_len: int,
            program: Program) -> tuple[Float[Array, "B V"], Float[Array, "L B T R+rope"]]:
    """Logits after each row's last prompt token, and the latent cache with room for `cache_len` positions.

    Prompts are padded on the right; what the padding leaves in the cache is overwritten before it can be seen.
    """
    B, S = tokens_BS.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    call = program.call(positions, (positions < lengths_B[:, None]).astype(jnp.int32))
    network = bind(program.cfg, params)
    hidden_BSD, _, latents = network(tokens_BS, call)
    last_BD = jnp.take_along_axis(hidden_BSD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    return network.logits(last_BD, call), jnp.pad(latents, ((0, 0), (0, 0), (0, cache_len - S), (0, 0)))


def decode(params: dict[str, Array], tokens_B: Int[Array, "B"], cache_LBTR: Array, at_B: Int[Array, "B"],
           program: Program) -> tuple[Float[Array, "B V"], Array]:
    """Logits after one more token per row, which takes position `at_B`."""
    call = program.call(at_B[:, None], jnp.ones((len(at_B), 1), jnp.int32))
    return bind(program.cfg, params).decode(tokens_B, cache_LBTR, at_B, call)


@partial(jax.jit, static_argnames=("room", "program"))
def _generate(params, tokens_BS, lengths_B, limits_B, stop_ids, sampling, *, room: int, program: Program):
    """[B, room] tokens and how many each row has; a row ends at a stop token or at its limit (0: it only pads the
    batch), and the loop when every row has ended."""
    B, S = tokens_BS.shape
    logits, cache = prefill(params, tokens_BS, lengths_B, S + room, program)
    first = choose(logits, lengths_B, sampling, program.greedy)

    def ended(token_B, n):
        return jnp.any(token_B[:, None] == stop_ids, axis=1) | (n >= limits_B)

    def unfinished(state):
        _, _, _, done, _, _ = state
        return ~jnp.all(done)

    def step(state):
        n, token, cache, done, out, count = state
        logits, cache = decode(params, token, cache, lengths_B + n - 1, program)
        token = choose(logits, lengths_B + n, sampling, program.greedy)
        return n + 1, token, cache, done | ended(token, n + 1), out.at[:, n].set(token), count + ~done

    out = jnp.zeros((B, room), jnp.int32).at[:, 0].set(first)
    state = (jnp.int32(1), first, cache, ended(first, 1), out, jnp.ones(B, jnp.int32))
    _, _, _, _, out, count = jax.lax.while_loop(unfinished, step, state)
    return out, count


_prefill = jax.jit(prefill, static_argnames=("cache_len", "program"))
_decode = jax.jit(decode, static_argnames=("program",), donate_argnums=(2,))
_choose = jax.jit(choose, static_argnames=("greedy",))


def _check(prompts: list[list[int]], max_new_tokens: int, vocab: int) -> None:
    require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {i} is empty; it needs at least one token")
        require(min(prompt) >= 0 and max(prompt) < vocab, f"prompt {i} has a token id outside [0, {vocab})")


def generate_batch(cfg: ModelConfig, params: dict[str, Array], prompts: list[list[int]], *, max_new_tokens: int,
                   stop_ids: tuple[int, ...], serving: Serving, amount: float, dtype: str, platform: str,
                   temperature: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0) -> list[list[int]]:
    """Continuations of all prompts, generated together on the device; the prompts may differ in length.

    A continuation ends with its stop token, or without one at `max_new_tokens`. `params` are masters, seen as
    `serving` and `amount` say (0 plain, 1 on the grid); pass `served_params.SERVED` for weights already prepared.
    Raises ConfigError on an empty prompt or an unknown token id.
    """
    if not prompts:
        return []
    _check(prompts, max_new_tokens, cfg.vocab_size)
    sampling = Sampling(temperature, top_p, min_p, seed).check()
    rows, width = bucket(len(prompts), 1), bucket(max(map(len, prompts)), 16)
    tokens = np.zeros((rows, width), np.int32)
    lengths, limits = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)], lengths[row], limits[row] = prompt, len(prompt), max_new_tokens
    program = Program(cfg, dtype, platform, greedy=temperature == 0)
    weights = params if serving == SERVED else serve(params, param_specs(cfg), serving, amount, dtype)
    out, count = jax.device_get(_generate(weights, tokens, lengths, limits, np.asarray(stop_ids or (-1,), np.int32),
                                          sampling, room=bucket(max_new_tokens, 16), program=program))
    return [out[row, :count[row]].tolist() for row in range(len(prompts))]


def stream(cfg: ModelConfig, params: dict[str, Array], prompt: list[int], *, max_new_tokens: int,
           stop_ids: tuple[int, ...], serving: Serving, amount: float, dtype: str, platform: str,
           temperature: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
           stats: Stats | None = None) -> Iterator[int]:
    """The tokens of `generate_batch` for one prompt, each as soon as it is known; `stats` is kept up to date."""
    _check([prompt], max_new_tokens, cfg.vocab_size)
    sampling = Sampling(temperature, top_p, min_p, seed).check()
    stats = Stats() if stats is None else stats
    program = Program(cfg, dtype, platform, greedy=temperature == 0)
    weights = params if serving == SERVED else serve(params, param_specs(cfg), serving, amount, dtype)
    start, length, width = time.perf_counter(), len(prompt), bucket(len(prompt), 16)
    stats.prompt_tokens = length
    logits, cache = _prefill(weights, np.pad(np.asarray([prompt], np.int32), ((0, 0), (0, width - length))),
                             np.asarray([length], np.int32), width + bucket(max_new_tokens, 16), program)
    for n in range(max_new_tokens):
        at = np.asarray([length + n], np.int32)
        token = _choose(logits, at, sampling, program.greedy)
        value = int(token[0])
        stats.new_tokens, stats.total_s = n + 1, time.perf_counter() - start
        if n == 0:
            stats.first_token_s = stats.total_s
        yield value
        if value in stop_ids:
            return
        logits, cache = _decode(weights, token, cache, at, program)
