"""The recorded fingerprints, config and probe of an export against the directory as it is now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quant.causes import cause
from quant.evidence import FILE, Fingerprint, Probe
from quant.findings import Report
from quant.hf_config import HARMLESS
from quant.tensor_file import Checkpoint

PROBE_TOLERANCE = 1e-2
"""Largest difference of a log-probability: another backend's bf16 sums, not another weight."""

COSMETIC = set(HARMLESS) | {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "architectures",
    "auto_map",
    "transformers_version",
    "max_position_embeddings",
}
"""Fields of config.json that may change without changing what the network computes."""


def load_evidence(directory: Path, report: Report) -> dict[str, Any] | None:
    """evidence.json, or None with a finding that says what stays unknown."""
    path = directory / FILE
    if not path.exists():
        report.add(
            "not checkable",
            "evidence",
            "no evidence.json: swapped projections, permuted groups and flipped bits break no "
            "rule of the format and cannot be seen",
        )
        return None
    try:
        content = json.loads(path.read_text())
        return {**content, "tensors": {name: Fingerprint.from_json(row) for name, row in content["tensors"].items()}}
    except (ValueError, KeyError, TypeError, IndexError):
        report.add("error", "evidence", f"{FILE} is unreadable; restore it from the export")
        return None


def check_evidence(
    checkpoint: Checkpoint, config: dict[str, Any] | None, evidence: dict[str, Any], report: Report
) -> None:
    """Every tensor's bytes and every field of the config; changed tensors are named with a cause where one fits."""
    recorded: dict[str, Fingerprint] = evidence["tensors"]
    now = {name: Fingerprint.of(entry.dtype, entry.shape, checkpoint.raw(name))
           for name, entry in sorted(checkpoint.tensors.items())}
    for name in sorted(recorded.keys() - now.keys()):
        report.add("error", "evidence", f"{name} was exported but is gone")
    for name in sorted(now.keys() - recorded.keys()):
        report.add("error", "evidence", f"{name} was not part of the export")
    changed = [name for name in now if name in recorded and now[name] != recorded[name]]
    for name in changed:
        report.add("error", "evidence", f"{name} is not what was exported: {cause(checkpoint, name, recorded, now)}")
    if not changed and recorded.keys() == now.keys():
        report.add("note", "evidence", f"all {len(now)} tensors are byte for byte what was exported")
    for key in sorted(evidence["config"].keys() | (config or evidence["config"]).keys()):
        was, is_ = evidence["config"].get(key), (config or evidence["config"]).get(key)
        if was != is_:
            report.add(
                "warning" if key in COSMETIC else "error",
                "evidence",
                f"config.json: {key} was {json.dumps(was)} when exported and is {json.dumps(is_)}",
            )


def check_probe(evidence: dict[str, Any], logits: Callable[[np.ndarray], np.ndarray] | None, report: Report) -> None:
    """The recorded log-probabilities against a forward pass of the directory's weights."""
    probe = evidence.get("probe")
    if probe is None:
        report.add("not checkable", "probe", "the export recorded no log-probabilities to repeat")
    elif logits is not None:
        tokens = np.asarray(probe["tokens"])
        error = np.abs(Probe.of(tokens, logits(tokens)).logprobs - np.asarray(probe["next_token_logprobs"])).max()
        if error <= PROBE_TOLERANCE:
            report.add("note", "probe", f"log-probabilities of the probe agree to {error:.2g}")
        else:
            report.add(
                "error",
                "probe",
                f"log-probabilities of the probe differ by {error:.3g}: the config or the reader computes "
                "another function",
            )
