"""Loss on held-out rows, in nats per token and bits per byte of source text."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from configs.schema import ConfigError
from data.pipeline import Data
from model import cross_entropy
from model.call import Call
from model.transformer import bind
from quant.served import Serving
from train.mesh import batch_sharding
from train.session import Session


class Evaluator:
    """Compiled once per run; called with the masters of the moment."""

    def __init__(self, session: Session, data: Data):
        self.session, self.data = session, data
        cfg, platform, dtype = session.cfg, session.platform, session.compute_dtype

        @jax.jit
        def sums(params, batch, amount):
            call = Call(batch["positions"], batch["segments"], amount, Serving.of(cfg.model, cfg.quant), dtype, platform)
            network = bind(cfg.model, params)
            hidden, _, _ = network(batch["tokens"], call)
            nll, _ = cross_entropy.chunked(hidden.reshape(-1, hidden.shape[-1]), call.exact_weight(network.head),
                                           batch["targets"].reshape(-1))
            weights = batch["weights"].reshape(-1)
            return jnp.sum(weights * nll), jnp.sum(weights)

        self._sums = sums

    def __call__(self, params: dict[str, Array], *, grid: bool, batches: int = 0) -> dict[str, float]:
        """Held-out loss with the experts on the grid or as they are in the masters; `batches` 0 takes all rows."""
        held_out = self.data.validation(batches)
        if not held_out:
            raise ConfigError("there are no held-out rows to evaluate on; raise --data.validation-fraction")
        amount = jnp.float32(1.0 if grid else 0.0)
        nll = weight = source_bytes = 0.0
        for batch in held_out:
            placed = jax.device_put(batch, batch_sharding(self.session.mesh))
            batch_nll, batch_weight = self._sums(params, placed, amount)
            nll, weight = nll + float(batch_nll), weight + float(batch_weight)
            source_bytes += self.data.source_bytes(batch)
        out = {"held_out_loss": nll / weight}
        if not self.session.cfg.data.paths:
            return out
        return out | {"bits_per_byte": nll / math.log(2) / source_bytes}
