"""One optimizer step, top to bottom: loss and gradients, Muon and AdamW, QK-Clip, router bias.

train/processes.py puts every row on its device; in `gradients` each device then works on what it holds, and what moves
between devices moves below it (docs/scale.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from configs.param_spec import Specs
from configs.schema import ModelConfig, RunConfig
from configs.sharding import TOKEN_AXES
from model import distillation, token_loss
from model.call import Call, LayerAux, ModelAux, MoEAux, combine, nothing_measured, over_devices
from model.decode.served_params import SERVED
from model.shards import ONE_DEVICE, Shards, shards_of
from model.stacked import Sums
from model.transformer import bind, param_specs
from optim.apply import apply_updates, stochastic_round
from optim.metrics import gradient_metrics, update_metrics
from quant.served import Serving, grid_amount
from train.checkpoint import fingerprint
from train.mesh import batch_sharding, param_shardings
from train.state import TrainState

Batch = dict[str, Array]
"""tokens, targets, positions, segments: int32 [B, S]; weights: float32 [B, S]."""

BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a step's batch."""
    rows, sharding = (cfg.train.batch_size, cfg.train.seq_len), batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(rows, dtype, sharding=sharding) for name, dtype in BATCH.items()}


@dataclass(frozen=True)
class StepConfig:
    """What is compiled into the step besides the run's config. settled: this program only takes steps at which the
    experts are wholly on their grid (quant.served.settled_step), and so may gather them packed."""

    run: RunConfig
    compute_dtype: str
    platform: str
    mesh: Mesh | None = None
    settled: bool = False

    @property
    def shards(self) -> Shards:
        return shards_of(self.mesh)


def loss_fn(
    params: dict[str, Array],
    teacher: dict[str, Array],
    batch: Batch,
    amount: Array,
    total_weight: Array,
    cfg: StepConfig,
    sums: Sums | None = None,
) -> tuple[Float[Array, ""], tuple[Array, ModelAux]]:
    """This device's share of sum(weight * nll) / total_weight plus the auxiliary losses; and (nll sum, measurements). With
    a teacher, quant.distill_weight of it is sum(weight * KL(teacher || student)) / total_weight instead.

    `total_weight` is the whole step's, so the shares of microbatches and devices add up to the global mean. Devices
    along tensor have the same tokens: each takes its part of their loss. `sums`: model/stacked.py.
    """
    run = cfg.run
    call = Call(
        batch["positions"],
        batch["segments"],
        amount,
        Serving.of(run.model, run.quant),
        cfg.compute_dtype,
        cfg.platform,
        run.train.remat,
        run.train.layers == "unroll",
        cfg.shards,
        run.train.transport,
        cfg.settled,
    )
    network = bind(run.model, params)
    hidden, aux, _ = network(batch["tokens"], call, sums)
    weights = batch["weights"].reshape(-1)
    taught_share = run.quant.distill_weight if teacher else 0.0
    factors = (1 - taught_share) / total_weight, run.train.z_loss / total_weight
    loss, nll_sum = token_loss.weighted(hidden, network.head, batch["targets"], weights, *factors, call)
    if teacher:
        as_it_was = replace(call, serving=SERVED, remat="none", settled=False)
        taught = bind(run.model, teacher)
        kl = distillation.divergences(hidden, network.head, taught(batch["tokens"], as_it_was)[0], taught.head, call)
        aux = replace(aux, teacher_kl=jnp.sum(weights * kl))
        loss += taught_share * aux.teacher_kl / total_weight
    if run.train.balance_loss:
        loss += run.train.balance_loss * jnp.sum(aux.moe.balance_loss) / run.train.batch_size
    return loss / cfg.shards.size("tensor"), (nll_sum, aux)


def gradients(
    params: dict[str, Array],
    batch: Batch,
    amount: Array,
    cfg: StepConfig,
    key: PRNGKeyArray | None = None,
    teacher: dict[str, Array] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array], ModelAux]:
    """Mean nll, gradients and measurements of a whole batch: global arrays in and out, in their shardings. `key`: of the
    rounding of sums of microbatches; not needed for float32 masters. `teacher`: a TrainState's.

    Inside, every device runs `local_gradients` on its rows and positions and on its parts of the parameters.
    """
    teacher = teacher or {}
    if cfg.shards == ONE_DEVICE:
        return local_gradients(params, teacher, batch, amount, key, cfg)
    parts = stored_parts(cfg.run.model, cfg.mesh)
    measured = ModelAux(LayerAux(P(None, "tensor")), MoEAux(P(), P()), P())
    run = jax.shard_map(
        partial(local_gradients, cfg=cfg),
        mesh=cfg.mesh,
        in_specs=(parts, {path: parts[path] for path in teacher}, batch_sharding(cfg.mesh).spec, P(), P()),
        out_specs=(P(), parts, measured),
        check_vma=False,
    )
    return run(params, teacher, batch, amount, key)


def stored_parts(model: ModelConfig, mesh: Mesh) -> dict[str, P]:
    """How each parameter is cut, for shard_map."""
    return {path: sharding.spec for path, sharding in param_shardings(param_specs(model), mesh).items()}


def own_part(batch: Batch, shards: Shards) -> Batch:
    """Batches lie cut into runs of neighbouring positions; a device works on an early and a late chunk of each of its rows
    (model/shards.py). Rows of integers are small, so it takes them whole and cuts them anew."""
    return {name: shards.own_positions(shards.gather_axis(x, ("context",), 1), 1) for name, x in batch.items()}


def local_gradients(
    params: dict[str, Array], teacher: dict[str, Array], batch: Batch, amount: Array, key: PRNGKeyArray | None, cfg: StepConfig
) -> tuple[Float[Array, ""], dict[str, Array], ModelAux]:
    """The same for one device, gradients summed over microbatches here and over devices once, at the end."""
    shards = cfg.shards
    if key is not None and shards != ONE_DEVICE:  # sums of devices are added up: roundings that are alike would be as well
        key = jax.random.fold_in(key, shards.index(*dict(shards.sizes)))
    batch = own_part(batch, shards)
    total_weight = shards.total(jnp.sum(batch["weights"]), TOKEN_AXES)
    nll, grads, aux = accumulated(params, teacher, batch, amount, total_weight, key, cfg)
    specs = param_specs(cfg.run.model)
    grads = {path: shards.total_gradient(g, specs[path]) for path, g in grads.items()}
    return shards.total(nll, TOKEN_AXES) / total_weight, grads, over_devices(aux, shards.split(TOKEN_AXES))


def accumulated(
    params: dict[str, Array],
    teacher: dict[str, Array],
    batch: Batch,
    amount: Array,
    total_weight: Array,
    key: PRNGKeyArray | None,
    cfg: StepConfig,
) -> tuple[Float[Array, ""], dict[str, Array], ModelAux]:
    """Sum of nll, gradients and measurements of this device's tokens, microbatch by microbatch: in float32, and kept in
    the masters' dtype between them and for the sum over devices. bfloat16 sums are rounded up or down at random, so that
    small summands count. To sums of the stacked layers the backward pass adds in place, so that there is one copy of them
    (model/stacked.py)."""
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    count, specs = cfg.run.train.accumulate, param_specs(cfg.run.model)
    if count == 1:
        (_, (nll, aux)), grads = grad(params, teacher, batch, amount, total_weight, cfg)
        return nll, grads, aux
    in_place = {path for path, spec in specs.items() if "layers" in spec.axes}
    fixed = {path: params[path] for path in in_place}

    def of_sums(rest, sums, rows, key):
        """The loss as a function of what is differentiated."""
        adding = Sums(bind(cfg.run.model, sums, partly=True).moe, key, _added) if sums else None
        return loss_fn(fixed | rest, teacher, rows, amount, total_weight, cfg, adding)

    # Microbatch m takes rows m, m + count, ... of every device: of all rows the same ones on any mesh.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)

    def add(carry, numbered_rows):
        index, rows = numbered_rows
        nll, grads, measured = carry
        of_rest, of_stacks = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, index))
        rest, sums = _split(params, in_place)[0], _split(grads, in_place)[1]
        (_, (more_nll, aux)), (more, sums) = jax.value_and_grad(of_sums, (0, 1), has_aux=True)(rest, sums, rows, of_stacks)
        grads = apply_updates(_split(grads, in_place)[0], more, of_rest) | sums
        return (nll + more_nll, grads, combine(measured, aux)), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(lambda: grad(params, teacher, first, amount, total_weight, cfg)[0][1][1])
    # Not the zero of other arrays: XLA up to jax 0.11 would keep the update's zeros in memory, a second array beside the sums.
    zero = jax.lax.optimization_barrier(jnp.zeros(()))
    start = jnp.zeros(()), jax.tree.map(lambda p: jnp.full_like(p, zero), params), nothing_measured(shapes)
    (nll, grads, aux), _ = jax.lax.scan(add, start, (jnp.arange(count), micro))
    return nll, grads, aux


def _split(tree: dict[str, Array], paths: set[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is not among `paths`, and what is."""
    return {k: x for k, x in tree.items() if k not in paths}, {k: x for k, x in tree.items() if k in paths}


def _added(total: Array, gradient: Array, key: PRNGKeyArray, index: Array) -> Array:
    """One layer's gradient of one array added to its sum; `index` tells layers and arrays apart."""
    more = total.astype(jnp.float32) + gradient
    return more if total.dtype == jnp.float32 else stochastic_round(more, jax.random.fold_in(key, index))


def make_train_step(
    cfg: StepConfig, specs: Specs, optimizer: optax.GradientTransformationExtraArgs, schedule: Callable
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure step; the loop compiles it with the state donated."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        amount = jnp.float32(1) if cfg.settled else grid_amount(cfg.run.quant, state.step)
        # Float32 masters need no noise; without the seed in it, runs that differ in nothing else share a compiled step.
        key = (
            None
            if cfg.run.optim.master_dtype == "float32"
            else jax.random.fold_in(jax.random.key(cfg.run.train.seed), state.step)
        )
        loss, grads, aux = gradients(state.params, batch, amount, cfg, key, state.teacher)
        norms = gradient_metrics(specs, cfg.run.optim, grads)
        # A step whose loss or gradient is not finite changes nothing but the two counters.
        finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
        updates, opt_state = optimizer.update(
            grads,
            state.optimizer,
            state.params,
            max_logits=aux.attention.max_logit,
            expert_counts=aux.moe.expert_counts,
            finite=finite,
        )
        params = apply_updates(state.params, updates, key)
        new = TrainState(params, opt_state, state.step + 1, state.skipped + jnp.where(finite, 0, 1), state.teacher)
        metrics = {
            "loss": loss,
            "data_print": sum(fingerprint(x) for x in batch.values()),
            "lr": schedule(state.optimizer.step),
            "grid_amount": amount,
            "skipped_steps": new.skipped,
            "tokens": jnp.sum(batch["segments"] > 0),
            **routing_metrics(aux, batch, cfg),
            **norms,
            **update_metrics(specs, cfg.run.optim, updates, opt_state),
        }
        if state.teacher:
            metrics["teacher_kl"] = aux.teacher_kl / jnp.sum(batch["weights"])
        return new, metrics

    return train_step


def routing_metrics(aux: ModelAux, batch: Batch, cfg: StepConfig) -> dict[str, Array]:
    """Load balance per MoE layer, dropped tokens (0 by construction, counted all the same), the largest logit."""
    counts = aux.moe.expert_counts
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-9)), axis=-1) / max(math.log(counts.shape[-1]), 1e-9)
    sent = jnp.sum(batch["segments"] > 0) * cfg.run.model.num_experts_per_tok
    return {
        "load_max_over_mean": jnp.max(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9),
        "load_entropy": entropy,
        "expert_load": share,
        "dropped_tokens": jnp.sum(sent - counts.astype(jnp.int32).sum(-1)),  # float32 cannot count to 2**24 and one
        "max_logit": jnp.max(aux.attention.max_logit),
    }
