"""The recorded hashes and probe of an export against the directory as it is now; a mismatch is tried under hypotheses."""

from __future__ import annotations

import json
from pathlib import Path
from collections.abc import Callable

import numpy as np

from quant import evidence
from quant.findings import Report
from quant.tensor_file import Checkpoint

PROBE_TOLERANCE = 1e-2
"""Largest difference of a log-probability: another backend's bf16 sums, not another weight."""


def check_hashes(checkpoint: Checkpoint, report: Report) -> None:
    """Every tensor's bytes against evidence.json; changed tensors are named with a cause where one fits."""
    path = checkpoint.directory / evidence.FILE
    if not path.exists():
        report.add("not checkable", "evidence", "no evidence.json: swapped projections, permuted groups and flipped bits break no "
                   "rule of the format and cannot be seen")
        return
    try:
        recorded = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError):
        report.add("error", "evidence", "evidence.json is unreadable; restore it from the export")
        return
    now = {name: evidence.digest(checkpoint.raw(name)) for name in sorted(checkpoint.tensors)}
    for name in sorted(recorded.keys() - now.keys()):
        report.add("error", "evidence", f"{name} was exported but is gone")
    for name in sorted(now.keys() - recorded.keys()):
        report.add("error", "evidence", f"{name} was not part of the export")
    changed = [name for name in now if name in recorded and now[name] != recorded[name]]
    for name in changed:
        report.add("error", "evidence", f"{name} is not what was exported: {cause(checkpoint, name, recorded, now)}")
    if not changed and recorded.keys() == now.keys():
        report.add("note", "evidence", f"all {len(now)} tensors are byte for byte what was exported")


def cause(checkpoint: Checkpoint, name: str, recorded: dict[str, str], now: dict[str, str]) -> str:
    """What happened to a tensor, in words."""
    owners = [other for other, digest in recorded.items() if digest == now[name] and other != name]
    if owners:
        other = owners[0]
        return f"it holds {other}" + (", and the other way round: they are swapped" if now.get(other) == recorded[name] else "")
    return "no known rearrangement explains it, so its values were changed"


def check_probe(directory: Path, logits: Callable[[np.ndarray], np.ndarray] | None, report: Report) -> None:
    """The recorded log-probabilities against a forward pass of the directory's weights."""
    path = directory / evidence.FILE
    if logits is None or not path.exists():
        return
    probe = json.loads(path.read_text()).get("probe")
    if probe is None:
        report.add("not checkable", "probe", "the export recorded no probe")
        return
    tokens = np.asarray(probe["tokens"])
    error = np.abs(evidence.Probe.of(tokens, logits(tokens)).logprobs - np.asarray(probe["next_token_logprobs"])).max()
    if not error <= PROBE_TOLERANCE:
        report.add("error", "probe", f"log-probabilities of the probe differ by {error:.3g}: the config or the reader computes "
                   "another function")
    else:
        report.add("note", "probe", f"log-probabilities of the probe agree to {error:.2g}")
