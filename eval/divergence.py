"""How far one set of weights drifts from another on the same text: KL divergence by position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.schema import ModelConfig
from data.pipeline import Batch
from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind
from train.weights import Weights


@partial(jax.jit, static_argnames=("cfg", "other_cfg", "dtype", "platform"))
def _kl(params, other, batch, *, cfg: ModelConfig, other_cfg: ModelConfig, dtype: str, platform: str) -> Float[Array, "B S"]:
    call = Call(batch["positions"], batch["segments"], jnp.float32(0), SERVED, dtype, platform)

    def log_probabilities(cfg, params):
        network = bind(cfg, params)
        return jax.nn.log_softmax(network.logits(network(batch["tokens"], call)[0], call))

    p, q = log_probabilities(cfg, params), log_probabilities(other_cfg, other)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def kl_by_octave(reference: Weights, other: Weights, batches: Sequence[Batch]) -> dict[int, float]:
    """Mean KL(reference || other) in nats over the trained tokens whose position lies in [k, 2k), for k = 1, 2, 4, ...

    Teacher-forced on the same rows: what accumulates here is the context's distortion, not the model's own mistakes.
    """
    sums: dict[int, list[float]] = {}
    for batch in batches:
        kl = np.asarray(
            _kl(
                reference.params,
                other.params,
                batch,
                cfg=reference.model,
                other_cfg=other.model,
                dtype=reference.dtype,
                platform=reference.platform,
            )
        )
        octave = 1 << np.floor(np.log2(np.maximum(batch["positions"], 1))).astype(int)
        for k in np.unique(octave[batch["weights"] > 0]):
            here = (octave == k) & (batch["weights"] > 0)
            total, count = sums.get(int(k), (0.0, 0))
            sums[int(k)] = [total + float(kl[here].sum()), count + int(here.sum())]
    return {k: total / count for k, (total, count) in sorted(sums.items())}
