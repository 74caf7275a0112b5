"""Loss on held-out rows, in nats per token and bits per byte of source text."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from configs.schema import ConfigError, ModelConfig
from data.pipeline import Data
from model import cross_entropy
from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind
from quant.served import Serving
from train import processes
from train.mesh import batch_sharding
from train.session import Session


@partial(jax.jit, static_argnames=("model", "serving", "dtype", "platform"))
def _sums(params, batch, amount, *, model: ModelConfig, serving: Serving, dtype: str, platform: str):
    """Sum of weight * nll, and of the weights."""
    call = Call(batch["positions"], batch["segments"], amount, serving, dtype, platform)
    network = bind(model, params)
    hidden, _, _ = network(batch["tokens"], call)
    nll, _ = cross_entropy.chunked(hidden.reshape(-1, hidden.shape[-1]), call.exact_weight(network.head),
                                   batch["targets"].reshape(-1))
    weights = batch["weights"].reshape(-1)
    return jnp.sum(weights * nll), jnp.sum(weights)


class Evaluator:
    """The held-out rows of a run."""

    def __init__(self, session: Session, data: Data):
        self.session, self.data = session, data

    def __call__(self, params: dict[str, Array], *, amount: float, batches: int = 0) -> dict[str, float]:
        """Loss of masters with this share of the grid; `batches` 0 takes all rows."""
        cfg = self.session.cfg
        return self._evaluate(params, amount, Serving.of(cfg.model, cfg.quant), batches)

    def of_served(self, weights) -> dict[str, float]:
        """Loss of an train.weights.Weights."""
        if weights.model.vocab_size != self.session.cfg.model.vocab_size:
            raise ConfigError(f"{weights.name} has another vocabulary than the run's data")
        return self._evaluate(weights.params, 0.0, SERVED, self.session.cfg.train.eval_batches, weights.model)

    def _evaluate(self, params, amount: float, serving: Serving, batches: int, model: ModelConfig | None = None):
        session = self.session
        held_out = self.data.validation(batches)
        if not held_out:
            raise ConfigError("there are no held-out rows to evaluate on; raise --data.validation-fraction")
        nll = weight = source_bytes = 0.0
        for batch in held_out:
            size = len(batch["tokens"])
            placed = processes.place(batch, batch_sharding(session.mesh), slice(0, size), size)
            batch_nll, batch_weight = _sums(params, placed, jnp.float32(amount), model=model or session.cfg.model,
                                            serving=serving, dtype=session.compute_dtype, platform=session.platform)
            nll, weight = nll + float(batch_nll), weight + float(batch_weight)
            source_bytes += self.data.source_bytes(batch)
        out = {"held_out_loss": nll / weight}
        if not session.cfg.data.paths:
            return out
        return out | {"bits_per_byte": nll / math.log(2) / source_bytes}
