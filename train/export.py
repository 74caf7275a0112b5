"""`launch.py export` and `launch.py verify`: from a run's checkpoint to a Hugging Face directory, and the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import jax
import numpy as np

from configs.platforms import platform_of
from configs.schema import ConfigError, QuantConfig
from model.transformer import param_specs
from quant.evidence import Probe
from quant.export import export_model
from quant.gguf_export import write_gguf
from quant.importer import Imported
from quant.read_config import read_config
from quant.served import Serving, grid_share
from quant.source import WeightSource
from quant.verify import Report, verify
from quant.verify_training import Training
from train import probe
from train.checkpoint import Checkpoints, Restored
from train.console import Bar, console, human
from train.run_dir import RunDir
from train.session import Session, open_to_look, parse_source, say_passed_over

PROBED = """A river does not read the map that was drawn of it. It takes the shortest way down, and where the ground is soft it
moves its bed. In 1910 the bridge at mile 17 stood over water; by 1954 it stood over a field, and the ferry was back in use."""
"""What the probe's rows are made of: the same for every run, so that an export needs none of the run's data."""


def export_run(source: str, out: Path | None, form: str) -> int:
    """Write a run's weights as an int4 or bf16 directory, with a model card of its measured numbers and evidence for `verify`."""
    run, step = parse_source(source)
    cfg = run.load_config()
    out = out or run.path / "export"
    if cfg.quant.grid == "int3" and form != "bf16":
        raise ConfigError(f"{run.path} was trained on three bits, which no engine reads; export it with --format bf16")
    if out.exists():
        raise ConfigError(f"{out} exists; name a new directory with --out, or remove it first")
    session = open_to_look(run)
    stored = _stored(session, run, step)
    params, step = stored.state, stored.step
    quant = dataclasses.replace(cfg.quant, grid="none" if form == "bf16" else "int4")
    rounded = form == "int4" and grid_share(cfg.quant, step) < 1
    if rounded:
        begins = f", which begins at step {cfg.quant.start_step}" if cfg.quant.grid == "int4" else ""
        console.print(
            f"[yellow]in training the experts of step {step} were not on the INT4 grid{begins}[/]: these files hold "
            "them rounded afterwards"
        )
    evidence = _probe(session, params, quant)
    with Bar(f"exporting {out}", 1, "tensor") as bar:
        summary = export_model(
            params,
            session.specs,
            cfg.model,
            quant,
            out,
            tokenizer=_TokenizerFiles(session),
            report=_measured(run, step, quant),
            rounded=rounded,
            probe=evidence,
            progress=bar.reach,
        )
    console.print(
        f"wrote {out}: {human(summary.weights)} weights of step {step} in {summary.bytes / 1e6:.2f} MB "
        f"({summary.bits_per_weight:.2f} bits per weight), {summary.files} file(s), {summary.tensors} tensors"
    )
    used = f" --run {quote(f'{run.path}@{step}')}"
    against = "" if rounded or quant.grid != cfg.quant.grid else used  # the run used other weights then
    console.print(f"check it with: python launch.py verify {quote(str(out))}{against}")
    return 0


def _stored(session: Session, run: RunDir, step: int | None) -> Restored:
    """A run's masters, read from disk as they are needed; says which checkpoints were passed over."""
    stored = Checkpoints(run.checkpoints).stored({path: spec.shape for path, spec in session.specs.items()}, step)
    say_passed_over(stored)
    return stored


class _TokenizerFiles:
    """The run's tokenizer with the run's system message and mode in its chat template."""

    def __init__(self, session: Session):
        self.session = session

    def save(self, directory: Path) -> None:
        data = self.session.cfg.data
        self.session.tokenizer.save(directory, data.system, data.mode)


def export_gguf(source: str, out: Path | None, pre_tokenizer: str | None) -> int:
    """One file for llama.cpp, by way of the run's INT4 export, which is made if it is not there, and must hold the same weights
    if it is. pre_tokenizer: as in quant/gguf_export.py."""
    run, step = parse_source(source)
    directory, out = run.path / "export", out or run.path / "model.gguf"
    if out.exists():
        raise ConfigError(f"{out} exists; name another file with --out, or remove it first")
    if not directory.exists():
        export_run(source, directory, "int4")
    else:
        session = open_to_look(run)
        stored = _stored(session, run, step)
        cfg = session.cfg

        def holds(grid: str) -> bool:
            serving = Serving(cfg.model.dtype, grid, cfg.quant.group_size)
            return _verified(directory, Training(stored.state, session.specs, serving, model=cfg.model), None).ok

        if not holds("int4"):
            raise ConfigError(
                f"{directory} is a bf16 export, and a gguf file is made of an int4 one; move it away, and that is made"
                if holds("none")
                else f"{directory} is damaged or not of step {stored.step}: launch.py verify {directory} --run "
                f"{run.path}@{stored.step} says where; move it away, and a new one is made"
            )
    summary = write_gguf(directory, out, pre_tokenizer)
    console.print(f"wrote {out}: {summary.tensors} tensors, {summary.groups} groups of codes as they are in {directory}")
    for note in summary.notes:
        console.print(note, markup=False)
    return 0


def _probe(session: Session, params: WeightSource, quant: QuantConfig) -> Probe:
    """Log-probabilities of two rows of text under exactly the exported weights, in float32."""
    rows = np.resize(np.asarray(session.tokenizer.encode(PROBED), np.int32), (2, 32))
    serving = Serving(session.cfg.model.dtype, quant.grid, quant.group_size)
    return Probe.of(rows, probe.logits(params, session.specs, session.cfg.model, serving, rows, session.platform))


def _measured(run: RunDir, step: int, quant: QuantConfig) -> dict[str, object]:
    """Numbers for the model card, from the run's own files: those that were measured on the weights that `quant` exports."""
    out = {"optimizer steps": step}
    exported = grid_share(run.load_config().quant, step - 1) == (quant.grid != "none")
    for row in run.read_metrics():
        if exported and row["step"] == step and row["kind"] == "eval":
            out |= {k.replace("_", " "): v for k, v in row.items() if k not in ("kind", "step")}
    return out


def verify_directory(directory: Path, source: str | None) -> int:
    """Print every finding; exit code 1 if a reader would get wrong weights, or others than the training forward of `source`."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory")
    training = None
    if source:
        run, step = parse_source(source)
        session = open_to_look(run)
        stored, cfg = _stored(session, run, step), session.cfg
        share = grid_share(cfg.quant, stored.step)
        training = Training(stored.state, session.specs, Serving.of(cfg.model, cfg.quant), share, cfg.model)
    report = _verified(directory, training, _logits_of(directory))
    console.print(str(report), markup=False)
    whole = all(finding.check == "reference" for finding in report.of("error"))
    console.print(f"{directory}: {'sound' if report.ok else 'NOT the weights that training used' if whole else 'DAMAGED'}")
    return 0 if report.ok else 1


def _verified(directory: Path, training: Training | None, logits: Callable | None) -> Report:
    """quant/verify.py, with its progress."""
    with Bar(f"verifying {directory}", 1, "tensor") as bar:
        return verify(directory, training=training, logits=logits, progress=bar.reach)


def _logits_of(directory: Path):
    """The directory's forward pass, for the recorded probe, a layer at a time as it was recorded."""

    def logits(rows: np.ndarray) -> np.ndarray:
        config = read_config(directory)
        specs = param_specs(config.model)
        files = Imported(directory, specs, prefix=config.prefix)
        return probe.logits(files, specs, config.model, Serving(config.model.dtype, "none"), rows, platform_of(jax.devices()[0]))

    return logits
