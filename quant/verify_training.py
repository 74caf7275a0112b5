"""Every weight of a directory against the one that the training forward used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.param_spec import Specs
from configs.platforms import platform_of
from configs.schema import ModelConfig, QuantConfig
from quant.findings import Report
from quant.hf_config import write_config
from quant.layout import all_slots
from quant.packed import Packed
from quant.read_config import read_config
from quant.served import Serving, as_served
from quant.source import LastBlock, WeightSource
from quant.tensor_file import Checkpoint
from quant.verify_evidence import COSMETIC


@dataclass(frozen=True)
class Training:
    """The masters of a step, and how its forward pass saw them: `amount` is the share of the grid (quant/served.py), `model` the
    network, where config.json is to be compared with it. Nothing of it comes from the directory that is judged."""

    weights: WeightSource
    specs: Specs
    serving: Serving
    amount: float = 1.0
    model: ModelConfig | None = None


def compare_network(directory: Path, model: ModelConfig, report: Report) -> None:
    """What config.json says of the network, in whatever spelling, against the one that was trained."""
    trained, found = (write_config(m, QuantConfig(grid="none")) for m in (model, read_config(directory).model))
    for key, was in trained.items():
        if (is_ := found[key]) != was:
            say = report.warn if key in COSMETIC else report.error
            say("config", f"config.json: {key} was {json.dumps(was)} in training and is {json.dumps(is_)}")


def compare_to_training(checkpoint: Checkpoint, packed: dict[str, Packed], training: Training, report: Report) -> None:
    """Every weight in the files against `as_served` of its master under jit, by the program that training has on this platform;
    counts the differences per tensor."""
    _check_grid({projection.group for projection in packed.values()}, training, report)
    source, specs, serving = LastBlock(training.weights), training.specs, training.serving
    amount = jnp.float32(training.amount)
    platform = platform_of(jax.devices()[0])
    served = jax.jit(lambda block, path: as_served(block, specs[path], serving, amount, platform), static_argnums=1)
    compared, wrong = 0, Counter()
    for slot in all_slots(specs):
        stem = slot.name.removesuffix(".weight")
        if stem in packed:
            stored = packed[stem].values(checkpoint)
        elif slot.name in checkpoint:
            stored = checkpoint.read(slot.name).astype(np.float32)
        else:
            report.error("reference", f"{slot.name} is not in the files")
            continue
        trained = slot.to_hf(np.asarray(served(source.read(slot.path, slot.block), slot.path)))
        if stored.shape != trained.shape:
            report.error("reference", f"{slot.name} has shape {stored.shape}, the training weights {trained.shape}")
            continue
        compared += trained.size
        wrong[slot.name] += int((stored != trained).sum())
    for name, count in wrong.items():
        if count:
            report.error("reference", f"{name}: {count:,} weights differ from those the training forward used")
    report.note("reference", f"{compared:,} weights compared with the training forward, {sum(wrong.values()):,} differ")


def _check_grid(groups: set[int], training: Training, report: Report) -> None:
    """Says why weights will differ, where files and run do not mean the same grid."""
    serving = training.serving
    if groups and (serving.grid == "none" or training.amount < 1):
        report.error(
            "reference",
            "the files hold experts on the INT4 grid, on which the training forward of this step did not "
            "have them: they were rounded afterwards",
        )
    elif not groups and serving.grid != "none" and training.amount > 0:
        report.error(
            "reference",
            f"the files hold experts off the grid, and the training forward of this step had them on {serving.grid.upper()}",
        )
    elif groups and groups != {serving.group_size}:
        report.error(
            "reference",
            f"the files hold groups of {', '.join(map(str, sorted(groups)))}, the training forward had "
            f"groups of {serving.group_size}",
        )
