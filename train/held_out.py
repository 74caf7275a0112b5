"""Loss on held-out rows, in nats per token and bits per byte of source text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from configs.schema import ConfigError, ModelConfig
from configs.sharding import ROW_AXES, TOKEN_AXES
from data.pipeline import Data
from model import cross_entropy
from model.call import Call
from model.decode.served_params import SERVED
from model.shards import ONE_DEVICE, shards_of
from model.transformer import bind
from quant.served import Serving
from train import processes
from train.mesh import batch_sharding
from train.session import Session
from train.step import Batch, own_part, stored_parts


@dataclass(frozen=True)
class Setting:
    """What is compiled in. microbatches: parts of a device's rows, one after another, as small as those it trains on."""

    model: ModelConfig
    serving: Serving
    dtype: str
    platform: str
    microbatches: int
    transport: str = "auto"
    mesh: Mesh | None = None


@partial(jax.jit, static_argnames="setting")
def sums(params: dict[str, Array], batch: Batch, amount: Array, setting: Setting) -> Float[Array, "2"]:
    """Sum of weight * nll, and of the weights, of a whole batch: global arrays in. As in train/step.py, every device works
    on its rows, its positions, and its parts of the parameters."""
    run = partial(_own_sums, setting=setting)
    if shards_of(setting.mesh) == ONE_DEVICE:
        return run(params, batch, amount)
    return jax.shard_map(
        run,
        mesh=setting.mesh,
        in_specs=(stored_parts(setting.model, setting.mesh), batch_sharding(setting.mesh).spec, P()),
        out_specs=P(),
        check_vma=False,
    )(params, batch, amount)


def _own_sums(params: dict[str, Array], batch: Batch, amount: Array, setting: Setting) -> Float[Array, "2"]:
    shards = shards_of(setting.mesh)

    def of_rows(rows: Batch) -> Float[Array, "2"]:
        call = Call(
            rows["positions"],
            rows["segments"],
            amount,
            setting.serving,
            setting.dtype,
            setting.platform,
            shards=shards,
            transport=setting.transport,
        )
        network = bind(setting.model, params)
        nll, _ = cross_entropy.losses(network(rows["tokens"], call)[0], network.head, rows["targets"], call)
        weights = rows["weights"].reshape(-1)
        return jnp.stack([jnp.sum(weights * nll), jnp.sum(weights)])

    micro = jax.tree.map(lambda x: x.reshape(setting.microbatches, -1, *x.shape[1:]), own_part(batch, shards))
    return shards.total(jnp.sum(jax.lax.map(of_rows, micro), axis=0), TOKEN_AXES)


def held_out_rows(data: Data, batches: int) -> list[Batch]:
    """The first held-out batches, 0 for all. ConfigError if nothing is held out."""
    rows = data.validation(batches)
    if not rows:
        raise ConfigError(
            "there are no held-out rows to evaluate on; raise --data.validation-fraction of a new training run, or give it data "
            "of more documents: the last ones are held out"
        )
    return rows


def require_same_ids(session: Session, weights) -> None:
    """ConfigError if an train.weights.Weights reads the ids of a run's data as other text."""
    same = weights.tokenizer is session.tokenizer or weights.tokenizer.fingerprint() == session.tokenizer.fingerprint()
    if not same or weights.model.vocab_size != session.cfg.model.vocab_size:
        raise ConfigError(
            f"{weights.name} has another {'vocabulary' if same else 'tokenizer'} than the run's data; evaluate it "
            "with a run of its own (weights without a tokenizer file count as bytes)"
        )


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
        require_same_ids(self.session, weights)
        return self._evaluate(weights.params, 0.0, SERVED, self.session.cfg.train.eval_batches, weights.model)

    def _setting(self, serving: Serving, model: ModelConfig) -> Setting:
        """A device that looks at a run that others trained has all of their rows to go through."""
        session, cfg = self.session, self.session.cfg
        trained, here = (
            math.prod(max(size, 1) for size in sizes)
            for sizes in ([getattr(cfg.mesh, axis) for axis in ROW_AXES], [session.mesh.shape[axis] for axis in ROW_AXES])
        )
        return Setting(
            model,
            serving,
            session.compute_dtype,
            session.platform,
            cfg.train.accumulate * max(trained // here, 1),
            cfg.train.transport,
            session.mesh,
        )

    def _evaluate(self, params, amount: float, serving: Serving, batches: int, model: ModelConfig | None = None):
        session = self.session
        held_out = held_out_rows(self.data, batches)
        setting = self._setting(serving, model or session.cfg.model)
        totals, source_bytes = np.zeros(2), 0
        for batch in held_out:
            size = len(batch["tokens"])
            placed = processes.place(batch, batch_sharding(session.mesh), slice(0, size), size)
            totals += np.asarray(sums(params, placed, jnp.float32(amount), setting))
            source_bytes += self.data.source_bytes(batch)
        nll, weight = totals.tolist()
        out = {"held_out_loss": nll / weight}
        if not session.cfg.data.paths or not source_bytes:  # of rows that train special tokens only
            return out
        return out | {"bits_per_byte": nll / math.log(2) / source_bytes}
