"""`verify`: is a compressed-tensors INT4 MoE directory what it seems? Re-reads every byte, needs no GPU and no engine.

Without a reference it checks the format, what engines demand, the grid, and the evidence our exports carry. With the
training masters it also proves that every weight a reader gets is the one the training forward used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configs.schema import ConfigError
from quant import verify_config, verify_evidence, verify_files, verify_values
from quant.evidence import FILE
from quant.findings import Report
from quant.packed import projections
from quant.tensor_file import Checkpoint, DamagedFile
from quant.verify_training import Training, compare_network, compare_to_training

UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, OSError, re.error)
"""What a check raises that meets another thing than a sound directory has in that place; ConfigError is a ValueError."""


@contextmanager
def _check(report: Report, name: str, failed: str) -> Iterator[None]:
    """One check. Where it cannot be finished that is a finding: of a damaged directory all the others must be known too."""
    try:
        yield
    except UNREADABLE as error:
        report.error(name, f"{failed}: {error if isinstance(error, ConfigError) else repr(error)}")


def verify(
    directory: str | Path,
    *,
    training: Training | None = None,
    logits: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a directory.

    training  the masters and the forward pass that every weight is compared with
    logits    forward pass [N, S] tokens -> [N, S, V] of the directory's weights, to repeat the recorded probe
    progress  called with (tensors checked, tensors in all)
    """
    directory, report = Path(directory), Report()
    config = verify_files.load_json(directory / "config.json", report)
    problems: list[str] = []
    try:
        checkpoint = Checkpoint(directory, problems)
    except DamagedFile as error:
        report.error("files", str(error))
        return report
    for problem in problems:
        report.error("files", problem)
    with _check(report, "index", f"{verify_files.INDEX} is unreadable, restore it"):
        verify_files.check_index(checkpoint, report)
    if config is not None:
        with _check(report, "config", "config.json is unreadable, restore it"):
            verify_config.check_config(config, report)
        with _check(report, "names", "config.json is unreadable, or a file of tensors is, restore it"):
            verify_files.check_tensors(checkpoint, config, report)
    packed = projections(checkpoint)
    with _check(report, "values", "a file of tensors is unreadable, restore it"):
        verify_values.check_values(checkpoint, packed, report, progress)
    evidence = verify_evidence.load_evidence(directory, report)
    if evidence is not None:
        with _check(report, "evidence", f"{FILE} is unreadable, or a file that it names is, restore it"):
            verify_evidence.check_evidence(checkpoint, config, evidence, report)
        with _check(report, "probe", "the probe could not be repeated"):
            verify_evidence.check_probe(evidence, logits, report)
    if training is not None:
        if training.model is not None and config is not None:
            with _check(report, "config", "config.json could not be compared with the network of training"):
                compare_network(directory, training.model, report)
        with _check(report, "reference", "the weights could not be compared with those of training"):
            compare_to_training(checkpoint, packed, training, report)
    return report
