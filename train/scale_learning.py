"""Learned scales as a baseline after training (LSQ's gradient, arXiv 1902.08153): the weights stay as they are, the scales
of their groups descend on the KL to the unquantised model.

Of all baselines this one sees what the whole network makes of its experts, and it costs what training costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from configs.schema import ModelConfig
from data.pipeline import Data
from model import distillation
from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind
from quant.codecs import CODECS
from quant.coverage import group_axis
from quant.learned_scales import encode, learned_grid
from quant.ptq import Quantized, nearest
from train.session import Session

PASSES, RATE = 4, 1e-2
"""Over the calibration batches; Adam's first learning rate, relative to a scale, which falls to zero along a cosine."""


def learned_scales(
    session: Session, params: dict[str, Array], reference: dict[str, Array], data: Data, batches: int, codec: str = "mse"
) -> Quantized:
    """Codes and scales for masters `params`. `reference` are the weights as served without the grid, whose function is to
    be kept on the run's first training batches; `codec` gives the first scales and the range of codes."""
    specs, group, high = session.specs, session.cfg.quant.group_size, CODECS[codec].high
    first = nearest(params, specs, group, codec).scales
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, PASSES * batches))
    ratios = jax.tree.map(jnp.ones_like, first)
    state = optimizer.init(ratios)
    update = _updater(
        session.cfg.model, {path: group_axis(specs[path]) for path in first}, group, high, session.platform, optimizer
    )
    kls = []
    for _ in range(PASSES):
        for step in range(batches):
            ratios, state, kl = update(ratios, state, first, {path: params[path] for path in first}, reference, data.batch(step))
            kls.append(kl)
    codes, scales = {}, {}
    for path in first:
        codes[path], scales[path] = encode(params[path], first[path] * ratios[path], group_axis(specs[path]), group, high)
    before, after = (float(sum(kls[at : at + batches])) / batches for at in (0, len(kls) - batches))
    note = (
        f"scales of {codec} learned in {len(kls)} steps on {batches} batches; KL to the unquantised model from "
        f"{before:.2g} in the first pass to {after:.2g} in the last"
    )
    return Quantized(codes, scales, group, notes=(note,))


def _updater(
    model: ModelConfig, axes: dict[str, int], group: int, high: int, platform: str, optimizer: optax.GradientTransformation
):
    """One step: (ratios to the first scales, Adam's state, first scales, masters, reference, batch) -> new ones and KL.
    `axes`: the grouped axis of every array on the grid."""

    def divergence(ratios, first, masters, reference, batch):
        experts = {
            path: learned_grid(masters[path], first[path] * ratios[path], axis, group, high) for path, axis in axes.items()
        }
        call = Call(batch["positions"], batch["segments"], jnp.float32(0), SERVED, "float32", platform)
        student, teacher = bind(model, reference | experts), bind(model, reference)
        hidden, taught = (network(batch["tokens"], call)[0] for network in (student, teacher))
        kl = distillation.divergences(hidden, student.head, taught, teacher.head, call)
        weights = batch["weights"].reshape(-1)
        return jnp.sum(weights * kl) / jnp.sum(weights)

    @jax.jit
    def update(ratios, state, first, masters, reference, batch):
        kl, grads = jax.value_and_grad(divergence)(ratios, first, masters, reference, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(ratios, updates), state, kl

    return update
