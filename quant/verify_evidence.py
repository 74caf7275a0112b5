"""The recorded fingerprints, config and probe of an export against the directory as it is now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quant.causes import cause
from quant.evidence import FILE, Fingerprint, Probe, digest
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
        marks = {name: Fingerprint.from_json(row) for name, row in content["tensors"].items()}
        if isinstance(content["config"], dict) and isinstance(content.get("files", {}), dict):
            return {**content, "tensors": marks}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError):
        pass
    report.error("evidence", f"{FILE} is unreadable; restore it from the export")
    return None


def check_evidence(checkpoint: Checkpoint, config: dict[str, Any] | None, evidence: dict[str, Any], report: Report) -> None:
    """Every tensor's bytes, every field of the config, and the tokenizer's files; changed tensors are named with a cause
    where one fits. Files that were not exported are the user's own."""
    recorded: dict[str, Fingerprint] = evidence["tensors"]
    now = {
        name: Fingerprint.of(entry.dtype, entry.shape, checkpoint.raw(name)) for name, entry in sorted(checkpoint.tensors.items())
    }
    for name in sorted(recorded.keys() - now.keys()):
        report.error("evidence", f"{name} was exported but is gone")
    for name in sorted(now.keys() - recorded.keys()):
        report.error("evidence", f"{name} was not part of the export")
    changed = [name for name in now if name in recorded and now[name] != recorded[name]]
    for name in changed:
        report.error("evidence", f"{name} is not what was exported: {cause(checkpoint, name, recorded, now)}")
    if not changed and recorded.keys() == now.keys():
        report.note("evidence", f"all {len(now)} tensors are byte for byte what was exported")
    exported = evidence["config"]
    present = exported if config is None else config
    for key in sorted(exported.keys() | present.keys()):
        was, is_ = exported.get(key), present.get(key)
        if was != is_:
            say = report.warn if key in COSMETIC else report.error
            say("evidence", f"config.json: {key} was {json.dumps(was)} when exported and is {json.dumps(is_)}")
    _check_files(checkpoint.directory, evidence.get("files"), report)


def _check_files(directory: Path, recorded: dict[str, str] | None, report: Report) -> None:
    if recorded is None:
        report.add(
            "not checkable",
            "evidence",
            "the export recorded no hashes of the tokenizer's files: whether they are those that were exported cannot be seen",
        )
        return
    for name, was in recorded.items():
        path = directory / name
        if not path.is_file():
            report.error("evidence", f"{name} was exported but is gone")
        elif digest(path.read_bytes()) != was:
            report.error("evidence", f"{name} is not the one that was exported; copy it again from the export")


def check_probe(evidence: dict[str, Any], logits: Callable[[np.ndarray], np.ndarray] | None, report: Report) -> None:
    """The recorded log-probabilities against a forward pass of the directory's weights."""
    probe = evidence.get("probe")
    if probe is None:
        report.add("not checkable", "probe", "the export recorded no log-probabilities to repeat")
    elif logits is not None:
        tokens = np.asarray(probe["tokens"])
        error = np.abs(Probe.of(tokens, logits(tokens)).logprobs - np.asarray(probe["next_token_logprobs"])).max()
        if error <= PROBE_TOLERANCE:
            report.note("probe", f"log-probabilities of the probe agree to {error:.2g}")
        else:
            report.error(
                "probe",
                f"log-probabilities of the probe differ by {error:.3g}: the config or the reader computes another function",
            )
