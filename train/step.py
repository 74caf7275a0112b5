"""One optimizer step, top to bottom: loss and gradients, Muon and AdamW, QK-Clip, router bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from configs.param_spec import Specs
from configs.schema import RunConfig
from model import cross_entropy
from model.call import Call, ModelAux, combine, nothing_measured
from model.transformer import bind
from optim.apply import apply_updates
from optim.metrics import optimizer_metrics
from quant.served import Serving, grid_amount
from train.state import TrainState

Batch = dict[str, Array]
"""tokens, targets, positions, segments: int32 [B, S]; weights: float32 [B, S]."""


@dataclass(frozen=True)
class StepConfig:
    """What is compiled into the step besides the run's config."""

    run: RunConfig
    compute_dtype: str
    platform: str


def loss_fn(params: dict[str, Array], batch: Batch, amount: Array, total_weight: Array, cfg: StepConfig
            ) -> tuple[Float[Array, ""], tuple[Array, ModelAux]]:
    """sum(weight * nll) / total_weight over these rows, plus the auxiliary losses; and (nll sum, measurements).

    `total_weight` is the whole step's, so the losses of microbatches and shards add up to the global mean.
    """
    run = cfg.run
    call = Call(batch["positions"], batch["segments"], amount, Serving.of(run.model, run.quant), cfg.compute_dtype,
                cfg.platform, run.train.remat)
    network = bind(run.model, params)
    hidden, aux, _ = network(batch["tokens"], call)
    nll, lse = cross_entropy.chunked(hidden.reshape(-1, hidden.shape[-1]), call.exact_weight(network.head),
                                     batch["targets"].reshape(-1))
    weights = batch["weights"].reshape(-1)
    nll_sum = jnp.sum(weights * nll)
    loss = nll_sum / total_weight
    if run.train.z_loss:
        loss += run.train.z_loss * jnp.sum(weights * lse**2) / total_weight
    if run.train.balance_loss:
        loss += run.train.balance_loss * jnp.sum(aux.moe.balance_loss) / run.train.batch_size
    return loss, (nll_sum, aux)


def gradients(params: dict[str, Array], batch: Batch, amount: Array, cfg: StepConfig
              ) -> tuple[Float[Array, ""], dict[str, Array], ModelAux]:
    """Mean loss, float32 gradients and measurements of a whole batch, microbatch by microbatch."""
    total_weight = jnp.sum(batch["weights"])
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    count = cfg.run.train.accumulate
    if count == 1:
        (_, (nll, aux)), grads = grad(params, batch, amount, total_weight, cfg)
        return nll / total_weight, grads, aux

    # Microbatch m takes rows m, m + count, ...: every device keeps a share of each microbatch.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)

    def add(carry, rows):
        (_, (nll, aux)), grads = grad(params, rows, amount, total_weight, cfg)
        new = nll, jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return (jax.tree.map(jnp.add, carry[0], new), combine(carry[1], aux)), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(lambda: grad(params, first, amount, total_weight, cfg)[0][1][1])
    zeros = jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    ((nll, grads), aux), _ = jax.lax.scan(add, (zeros, nothing_measured(shapes)), micro)
    return nll / total_weight, grads, aux


def make_train_step(cfg: StepConfig, specs: Specs, optimizer: optax.GradientTransformationExtraArgs,
                    schedule: Callable) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure step; the loop compiles it with the state donated."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        amount = grid_amount(cfg.run.quant, state.step)
        loss, grads, aux = gradients(state.params, batch, amount, cfg)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params,
                                              max_logits=aux.attention.max_logit, expert_counts=aux.moe.expert_counts)
        key = jax.random.fold_in(jax.random.key(cfg.run.train.seed), state.step)
        params = apply_updates(state.params, updates, key)

        report = optimizer_metrics(specs, cfg.run.optim, grads, updates, opt_state)

        # A step whose loss or gradient is not finite changes nothing but the two counters.
        finite = jnp.isfinite(loss) & jnp.isfinite(report["grad_norm"])
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state),
                                         (state.params, state.optimizer))
        new = TrainState(params, opt_state, state.step + 1, state.skipped + jnp.where(finite, 0, 1))
        metrics = {"loss": loss, "lr": schedule(state.step), "grid_amount": amount, "skipped_steps": new.skipped,
                   "tokens": jnp.sum(batch["segments"] > 0), **routing_metrics(aux, batch, cfg),
                   **report}
        return new, metrics

    return train_step


def routing_metrics(aux: ModelAux, batch: Batch, cfg: StepConfig) -> dict[str, Array]:
    """Load balance per MoE layer, dropped tokens (0 by construction, counted all the same), the largest logit."""
    counts = aux.moe.expert_counts
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1) / jnp.log(counts.shape[-1])
    sent = jnp.sum(batch["segments"] > 0) * cfg.run.model.num_experts_per_tok
    return {"load_max_over_mean": jnp.max(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9),
            "load_entropy": entropy, "expert_load": share, "dropped_tokens": jnp.sum(sent - counts.sum(-1)),
            "max_logit": jnp.max(aux.attention.max_logit)}
