"""Post-training baselines of a run's masters, by the names that the command line knows: `RUN:gptq`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxtyping import Array

from data.pipeline import Data
from model.decode.served_params import serve
from quant.awq import BlockPaths, awq_experts
from quant.calibration import Calibration, calibrate
from quant.ptq import Quantized, gptq_experts, nearest
from quant.served import Serving
from train.expert_inputs import expert_inputs
from train.scale_learning import learned_scales
from train.session import Session

BLOCK = BlockPaths("moe.mlp.experts_gate_up", "moe.mlp.experts_down", "moe.post_norm", "moe.mlp.router", "moe.mlp.shared.gate_up")

ROUNDED = {
    "rtn": "kimi7",
    "rtn75": "ct75",
    "mse": "mse",
    "mse_signed": "mse_signed",
    "hqq": "hqq",
    "rtn3": "int3",
    "mse3": "mse3",
}
"""Rounding to nearest: name -> rule of quant/codecs.py. rtn is the training grid, absmax / 7; rtn75 compressed-tensors'
absmax / 7.5; mse, mse_signed and hqq search their scales; rtn3 and mse3 have three bits in the same file."""

CALIBRATED: dict[str, Callable[..., Quantized]] = {
    "gptq": gptq_experts,
    "awq": partial(awq_experts, paths=BLOCK),
    "gptq3": partial(gptq_experts, codec="mse3"),
    "awq3": partial(awq_experts, paths=BLOCK, codec="mse3"),
}
"""Methods that look at the run's training data first; all on scales of a least-squares search."""

LEARNED = {"lsq": "mse", "lsq3": "mse3"}
"""Scales that descend on the KL over training data: name -> rule that they start from."""

BASELINES = (*ROUNDED, *CALIBRATED, *LEARNED)

CALIBRATION_BATCHES = 8
"""Training batches that a calibrated method sees unless told otherwise."""


def served_plain(session: Session, params: dict[str, Array]) -> dict[str, Array]:
    """Rounded to the served dtype, experts taken as they are."""
    return serve(params, session.specs, Serving(session.cfg.model.dtype, "none"), 0.0, session.compute_dtype)


def calibration_of(session: Session, params: dict[str, Array], data: Data, batches: int) -> Calibration:
    """Second moments of what enters every expert in the bf16 model, over the run's first training batches."""
    reference = served_plain(session, params)
    layers = (
        entry
        for step in range(batches)
        for entry in expert_inputs(session.cfg.model, reference, data.batch(step), session.platform)[0]
    )
    return calibrate(layers, reference[BLOCK.gate_up], BLOCK.gate_up, BLOCK.down)


def baseline(
    session: Session,
    params: dict[str, Array],
    name: str,
    opened: Callable[[], Data],
    calibration: Calibration | None = None,
    batches: int = CALIBRATION_BATCHES,
) -> Quantized:
    """Codes and scales of a baseline; a calibrated one takes `calibration`, or the first `batches` training batches of the data
    that `opened` gives."""
    group = session.cfg.quant.group_size
    if name in ROUNDED:
        return nearest(params, session.specs, group, ROUNDED[name])
    if name in LEARNED or calibration is None:
        data = opened()
    if name in LEARNED:
        return learned_scales(session, params, served_plain(session, params), data, batches, LEARNED[name])
    if calibration is None:
        calibration = calibration_of(session, params, data, batches)
    return CALIBRATED[name](params, session.specs, group, calibration)
