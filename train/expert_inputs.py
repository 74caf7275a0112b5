"""The tokens that enter each layer's experts, with their routing: what calibration and distortion.py look at."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.schema import ModelConfig
from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind
from quant.calibration import ExpertInputs


@partial(jax.jit, static_argnums=(0, 3))
def _run(cfg: ModelConfig, params: dict[str, Array], batch: dict[str, Array], platform: str):
    """Logits, and per MoE layer the normed tokens, choices and gates; the loop is the network's own, layer by layer."""
    network = bind(cfg, params)
    call = Call(batch["positions"], batch["segments"], jnp.float32(0), SERVED, "float32", platform)
    valid = (batch["segments"] > 0).reshape(-1, 1)
    x = call.weight(network.embed)[batch["tokens"]]
    for layer in network.dense:
        x = layer(x, call)[0]

    def body(x, layer):
        entering = x + layer.attention(layer.input_norm(x, call), call)[0]
        normed = layer.post_norm(entering, call).reshape(-1, cfg.hidden_size)
        experts, gates, _ = layer.feed_forward.router(normed, call)
        return layer(x, call)[0], (normed, experts, gates * valid)

    x, layers = jax.lax.scan(body, x, network.moe)
    return network.logits(network.final_norm(x, call), call), layers


def expert_inputs(
    cfg: ModelConfig, params: dict[str, Array], batch: dict[str, Array], platform: str
) -> tuple[list[ExpertInputs], Float[Array, "B S V"]]:
    """One entry per MoE layer, and the logits, computed in float32 from served weights (model/decode/served_params.py).

    `batch` has tokens, positions and segments as in training; padding tokens come out with gates of 0.
    """
    batch = {key: jnp.asarray(batch[key]) for key in ("tokens", "positions", "segments")}
    logits, (x, experts, gates) = _run(cfg, params, batch, platform)
    return [ExpertInputs(i, x[i], experts[i], gates[i]) for i in range(len(x))], logits
