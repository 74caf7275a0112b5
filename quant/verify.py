"""`verify`: is a compressed-tensors INT4 MoE directory what it seems? Re-reads every byte, needs no GPU and no engine.

Without a reference it checks the format, what engines demand, the grid, and the evidence our exports carry. With the
training masters it also proves that every weight a reader gets is the one the training forward used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.param_spec import Specs
from configs.schema import ModelConfig, QuantConfig
from quant import verify_config, verify_evidence, verify_files, verify_values
from quant.findings import Report
from quant.layout import all_slots
from quant.packed import Packed, projections
from quant.served import Serving, as_served
from quant.source import LastBlock, WeightSource
from quant.tensor_file import Checkpoint, DamagedFile


def verify(directory: str | Path, *, reference: WeightSource | None = None, specs: Specs | None = None,
           logits: Callable[[np.ndarray], np.ndarray] | None = None,
           progress: Callable[[int, int], None] | None = None) -> Report:
    """Check a directory; `reference` and `specs` go together and compare every weight to the training forward's.

    logits    forward pass [N, S] tokens -> [N, S, V] of the directory's weights, to repeat the recorded probe
    progress  called with (tensors checked, tensors in all)
    """
    directory, report = Path(directory), Report()
    config = verify_files.load_json(directory / "config.json", report)
    problems: list[str] = []
    try:
        checkpoint = Checkpoint(directory, problems)
    except DamagedFile as error:
        report.add("error", "files", str(error))
        return report
    for problem in problems:
        report.add("error", "files", problem)
    verify_files.check_index(checkpoint, report)
    if config is not None:
        verify_config.check_config(config, report)
        verify_files.check_tensors(checkpoint, config, report)
    packed = projections(checkpoint)
    verify_values.check_values(checkpoint, packed, report, progress)
    evidence = verify_evidence.load_evidence(directory, report)
    if evidence is not None:
        verify_evidence.check_evidence(checkpoint, config, evidence, report)
        verify_evidence.check_probe(evidence, logits, report)
    if reference is not None and specs is not None:
        compare_to_training(checkpoint, packed, reference, specs, config, report)
    return report


def compare_to_training(checkpoint: Checkpoint, packed: dict[str, Packed], reference: WeightSource, specs: Specs,
                        config: dict[str, Any] | None, report: Report) -> None:
    """Every weight in the files against `as_served` of its master under jit; counts the differences per tensor."""
    source = LastBlock(reference)
    group = next((p.group for p in packed.values()), 0)
    model = ModelConfig(dtype=(config or {}).get("torch_dtype", "bfloat16"))
    serving = Serving.of(model, QuantConfig(grid="int4", group_size=group) if packed else QuantConfig(grid="none"))
    served = jax.jit(lambda block, path: as_served(block, specs[path], serving, jnp.float32(1)), static_argnums=1)
    compared, wrong = 0, Counter()
    for slot in all_slots(specs):
        stem = slot.name.removesuffix(".weight")
        if stem in packed:
            stored = packed[stem].values(checkpoint)
        elif slot.name in checkpoint:
            stored = checkpoint.read(slot.name).astype(np.float32)
        else:
            report.add("error", "reference", f"{slot.name} is not in the files")
            continue
        trained = slot.to_hf(np.asarray(served(source.read(slot.path, slot.block), slot.path)))
        if stored.shape != trained.shape:
            report.add(
                "error", "reference", f"{slot.name} has shape {stored.shape}, the training weights {trained.shape}"
            )
            continue
        compared += trained.size
        wrong[slot.name] += int((stored != trained).sum())
    for name, count in wrong.items():
        if count:
            report.add("error", "reference", f"{name}: {count:,} weights differ from those the training forward used")
    report.add(
        "note", "reference", f"{compared:,} weights compared with the training forward, {sum(wrong.values()):,} differ"
    )
