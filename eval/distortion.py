"""What INT4 costs, arm by arm: every post-training baseline of a run's weights, and any other weights, against bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
from jaxtyping import Array
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from configs.schema import ConfigError, ModelConfig, QuantConfig
from eval.results import write_result
from quant.distortion import Distortion, ExpertWeights, kl_by_position, measure
from quant.hf_config import write_config
from quant.verify_evidence import COSMETIC
from train.baselines import BASELINES, BLOCK, baseline, calibration_of, served_plain
from train.console import Bar, console
from train.expert_inputs import expert_inputs
from train.held_out import Evaluator, held_out_rows, require_same_ids
from train.run_data import data_of
from train.session import Session, load_params, open_to_look, parse_source
from train.weights import Weights, load_arms

COLUMNS = {
    "held_out_loss": "loss",
    "kl": "KL",
    "kl_per_decade_of_position": "slope",
    "weight_error": "weights",
    "function_error": "experts",
    "function_error_p99": "p99",
    "overlap_last_layer": "routing",
}


def distortion_report(source: str, others: tuple[str, ...] = (), calibration_batches: int = 8) -> int:
    """Write `RUN/distortion.json` and print a table.

    source                RUN or RUN@STEP; its masters in bf16 are the reference, and are what the baselines quantise
    others                further arms, NAME=WEIGHTS as in eval (a QAT run, an exported directory), with names of their own
    calibration_batches   training batches that the calibrated baselines see
    """
    run, step = parse_source(source)
    session = open_to_look(run)
    if calibration_batches < 1:
        raise ConfigError(f"--calibration-batches must be at least 1, not {calibration_batches}")
    extra = load_arms(others, taken=("bf16", *BASELINES))
    for name, weights in extra:
        require_same_ids(session, weights)
        _require_same_network(session.cfg.model, weights.model, name)
    masters, step = load_params(session, run, step)
    data = data_of(session, run)
    report = _Report(session, data, masters, calibration_batches)
    rows = {}
    with Bar("distortion", 1 + len(BASELINES) + len(extra), "arm") as bar:
        for name, params, effective, notes in report.arms(extra):
            rows[name] = report.row(params, effective) | {"notes": notes}
            bar.advance(1)
    path = Path(run.path) / "distortion.json"  # an expert nobody visited and a position no text reaches have no error: nan
    write_result(path, {"step": step, "jax": jax.__version__, "arms": rows})
    console.print(_table(rows))
    for name, row in rows.items():
        for note in row["notes"]:
            console.print(f"{name}: {note}", markup=False)
    console.print(f"every layer and expert: {path}", markup=False)
    return 0


def _require_same_network(reference: ModelConfig, other: ModelConfig, name: str) -> None:
    """ConfigError where an arm's weights belong to another network: they are sent through the reference's."""
    here, there = (write_config(model, QuantConfig(grid="none")) for model in (reference, other))
    differs = [key for key, value in here.items() if key not in {*COSMETIC, "torch_dtype"} and there[key] != value]
    if differs:
        key = differs[0]
        raise ConfigError(f"{name} is another network than the run ({key} {there[key]}, not {here[key]}): compare both by eval")


class _Report:
    """The reference's trace on the held-out rows, and what it takes to compare another arm to it."""

    def __init__(self, session: Session, data, masters: dict[str, Array], calibration_batches: int):
        self.session, self.masters, self.calibration_batches, self.data = session, masters, calibration_batches, data
        self.cfg, self.evaluator = session.cfg, Evaluator(session, data)
        (self.batch,) = held_out_rows(data, 1)
        self.reference = served_plain(session, masters)
        self.inputs, self.logits = self.trace(self.reference, self.batch)

    def trace(self, params, batch):
        return expert_inputs(self.cfg.model, params, batch, self.session.platform)

    def arms(self, extra: list[tuple[str, Weights]]) -> Iterator[tuple[str, dict, dict, tuple[str, ...]]]:
        """(name, served parameters, its experts in the reference's basis, notes)."""
        yield "bf16", self.reference, self.reference, ()
        calibration = calibration_of(self.session, self.masters, self.data, self.calibration_batches)
        for name in BASELINES:
            arm = baseline(self.session, self.masters, name, lambda: self.data, calibration, self.calibration_batches)
            values = arm.fake(self.masters, self.session.specs)
            yield name, served_plain(self.session, values), arm.effective(self.session.specs), arm.notes
        for name, weights in extra:
            yield name, weights.params, weights.params, ()

    def row(self, params: dict[str, Array], effective: dict[str, Array]) -> dict:
        weights = Weights(
            "arm", self.cfg.model, params, self.session.tokenizer, self.session.compute_dtype, self.session.platform
        )
        inputs, logits = self.trace(params, self.batch)
        kl = kl_by_position(self.logits, logits, self.batch["positions"], self.batch["segments"] > 0)
        found: Distortion = measure(
            *(ExpertWeights(p[BLOCK.gate_up], p[BLOCK.down]) for p in (self.reference, effective)), self.inputs, inputs, kl
        )
        return {**self.evaluator.of_served(weights), **found.to_json()}


def _table(rows: dict[str, dict]) -> Table:
    table = Table(
        title="distortion against bf16",
        caption="loss: nats per trained token of the held-out rows; KL to bf16 and its slope per tenfold position: over all "
        "tokens of some of them, prompts too; relative error of weights, and of experts' outputs: mean and 99th percentile; "
        "routing: Jaccard index of the expert sets in the last layer",
        box=SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    for label in COLUMNS.values():
        table.add_column(label, justify="right")
    for name, row in rows.items():
        values = {**row["summary"], **row}
        table.add_row(Text(name), *(f"{values[key]:.4f}" if key == "held_out_loss" else f"{values[key]:.2g}" for key in COLUMNS))
    return table
