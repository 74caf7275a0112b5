"""Small configurations and random weights for the tests of model/."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ModelConfig
from model.call import Call
from model.decode.generate import Decoder, Program, extend
from model.decode.sampling import GREEDY, Sampling
from model.decode.served_params import SERVED, serve
from model.transformer import bind, param_specs
from quant.coverage import group_axis
from quant.resident import Int4Weight, to_int4
from quant.served import Serving

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    dtype="float32",
)

EXACT = Serving(dtype="float32", grid="none")


def small(**changes) -> ModelConfig:
    return ModelConfig(**SMALL | changes)


def random_params(cfg: ModelConfig, std: float = 0.3, seed: int = 0, bias: float = 0.0) -> dict[str, jax.Array]:
    """float32 weights large enough that every part of the network shows in the logits; `bias` spreads the router's."""
    params = {}
    for path, spec in param_specs(cfg).items():
        x = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(spec.shape)
        if spec.update == "router_bias":
            x = x * bias
        elif spec.init == "ones":
            x = 1 + 0.2 * x
        else:
            x = x * std
        params[path] = jnp.asarray(x, jnp.float32)
    return params


def call_for(tokens, segments=None, serving: Serving = EXACT, amount: float = 0.0, dtype: str = "float32", **more) -> Call:
    """One document per row unless `segments` says otherwise; positions restart with every document."""
    segments = np.ones(tokens.shape, np.int32) if segments is None else np.asarray(segments)
    positions = np.zeros(segments.shape, np.int32)
    for t in range(1, segments.shape[1]):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    return Call(jnp.asarray(positions), jnp.asarray(segments), jnp.float32(amount), serving, dtype=dtype, **more)


def forward_logits(
    model: ModelConfig, served: dict[str, jax.Array], rows: np.ndarray, platform: str, dtype: str = "float32"
) -> np.ndarray:
    """[N, S] tokens -> [N, S, V] float32 logits of served weights, computing in `dtype`."""

    @jax.jit
    def forward(params, tokens):
        call = call_for(rows, serving=SERVED, dtype=dtype, platform=platform)
        network = bind(model, params)
        return network.logits(network(tokens, call)[0], call)

    return np.asarray(forward(served, jnp.asarray(rows)))


def generate_batch(
    cfg: ModelConfig,
    params: dict[str, jax.Array],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    serving: Serving,
    amount: float,
    dtype: str,
    platform: str,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continuations of all prompts, generated together; the prompts may differ in length. `params` are masters, seen
    as `serving` and `amount` say (0 plain, 1 on the grid); with `served_params.SERVED` they are taken as they are."""
    if not prompts:
        return []
    weights = params if serving == SERVED else serve(params, param_specs(cfg), serving, amount, dtype)
    decoder = Decoder(cfg, weights, len(prompts), stop_ids=stop_ids, dtype=dtype, platform=platform, sampling=sampling)
    return list(decoder.reply(dict(enumerate(prompts)), max_new_tokens).values())


def wide(packed: bool) -> tuple[ModelConfig, dict[str, jax.Array | Int4Weight]]:
    """A network as wide as the decoding kernels want it, with served bfloat16 weights, or its experts at four bits. Every
    token uses all experts: of a few, another rounding to bfloat16 would choose others here and there."""
    cfg = small(hidden_size=128, moe_intermediate_size=128, num_experts_per_tok=8, dtype="bfloat16")
    specs = param_specs(cfg)
    served = serve(random_params(cfg, std=0.1), specs, Serving("bfloat16", "int4", 32), 1.0, "bfloat16")
    on_grid = {path: to_int4(w, group_axis(specs[path]), 32) for path, w in served.items() if packed and specs[path].on_grid}
    return cfg, served | on_grid


def step_by_step(cfg: ModelConfig, params, rows: int, platform: str, positions: int = 6) -> np.ndarray:
    """[positions, rows, V] logits of tokens that go on, one for each row at a time, from an empty cache."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (positions, rows, 1)).astype(np.int32)
    cache = jnp.zeros((cfg.num_hidden_layers, rows, 16, cfg.kv_lora_rank + cfg.qk_rope_head_dim), jnp.bfloat16)
    program, out = Program(cfg, "bfloat16", platform, True), []
    step = jax.jit(extend, static_argnames="program")
    for at, new in enumerate(tokens):
        logits, cache = step(params, new, cache, np.full((rows, 1), at, np.int32), program=program)
        out.append(logits)
    return np.asarray(out)
