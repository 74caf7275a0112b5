"""What INT4 costs on models trained here, and how much of it each remedy gives back: text and the reasoning task, three seeds.

    python -m bench.quant_table TEXT_FILE [--work DIR] [--tasks text chain] [--seeds 0 1 2] [--write]

Per task and seed one network (0.2 M parameters) is trained in bf16. Runs fork from it (train.fork_from), see the same batches
under the same learning rates, and have their experts on a grid or not: a bf16 control, QAT, QAT with the fork's weights as a
teacher, QAT at three bits. They fork at two places: before the learning rate falls, so that training on the
grid and cooldown are one, and afterwards, from the finished model. Baselines quantise the control, which has seen as many
tokens. Every arm is evaluated by the same forward pass on all held-out rows, so differences to the control are paired.
Finished runs and losses lie in DIR and are not repeated: the same command goes on where the last one stopped. With --write
the tables and their picture go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Array
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import t as student

from bench.measure import RESULTS, machine
from configs.presets import preset
from configs.schema import DataConfig, QuantConfig, RunConfig
from data.pipeline import open_data
from model.transformer import param_specs
from quant.calibration import Calibration
from train.baselines import baseline, calibration_of, served_plain
from train.checkpoint import Checkpoints
from train.compat import keep_freed_memory, start_jax
from train.console import Bar, console
from train.held_out import Evaluator
from train.machine import Machine, build
from train.run_dir import RunDir
from train.session import Session, load_params, open_session
from train.start import starting_state
from train.weights import Weights, load_weights

TASKS = ("text", "chain")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Stage:
    """From which optimizer step to which runs differ, and their optimizer: peak rate, and share of the steps at the end in
    which the rate falls to a tenth. Steps are of 2,048 tokens."""

    start: int
    end: int
    lr: float
    decay_fraction: float


STAGES = {"fused with the cooldown": Stage(300, 400, 8e-3, 0.3), "afterwards": Stage(400, 480, 2e-3, 1 / 6)}
"""In the first the control is the first network itself, carried on. 8e-3 is what bench.steps_to_loss found for Muon; the rate
of the second is a quarter of it and was not searched."""

CALIBRATION_BATCHES = 8
INT4, INT3 = "four bits", "three bits"
FIRST, BEFORE = "fused with the cooldown", "bf16 at the fork"

FORKS = {
    "QAT": QuantConfig("int4"),
    "QAT, distilled": QuantConfig("int4", distill_weight=0.5),
    "QAT, 3 bits": QuantConfig("int3"),
}
"""Arms that are trained besides the control; all switch to their grid at the fork at once."""

BLOCKS = {
    INT4: ("rtn", "rtn75", "mse", "mse_signed", "hqq", "gptq", "awq", "QAT", "QAT, distilled"),
    INT3: ("rtn3", "mse3", "gptq3", "awq3", "QAT, 3 bits"),
}
"""Rounding to nearest, whose loss over the control is the gap, and what competes with it in the same file format."""

BF16 = QuantConfig("none")


def config(task: str, text: str, seed: int, stage: Stage, quant: QuantConfig = BF16, fork: Path | None = None) -> RunConfig:
    """A member of tiny's family, half as wide, with one MoE layer of 8 experts: 0.2 M parameters, minutes of one core."""
    base = preset("tiny")
    data = DataConfig(paths=(text,), seed=seed) if task == "text" else replace(base.data, seed=seed)
    return replace(
        base,
        model=replace(
            base.model,
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=192,
            moe_intermediate_size=64,
            num_attention_heads=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=8,
        ),
        optim=replace(base.optim, lr=stage.lr, decay_fraction=stage.decay_fraction),
        quant=quant,
        data=data,
        train=replace(
            base.train,
            steps=stage.end,
            batch_size=16,
            seq_len=128,
            seed=seed,
            compute_dtype="float32",
            eval_batches=0 if data.paths else 55,
            fork_from=f"{fork}@{stage.start}" if fork else None,
        ),
    )


class Cell:
    """One stage, task and seed: its runs and the losses of its arms."""

    def __init__(self, work: Path, stage: str, task: str, text: str, seed: int):
        self.stage, self.task, self.text, self.seed = stage, task, text, seed
        self.first = work / f"{task}-{seed}" / "bf16"
        self.path = self.first.parent if stage == FIRST else self.first.parent / stage
        self.file = self.path / "losses.json"

    def run(self, arm: str) -> RunDir:
        return RunDir(self.path / arm.replace(", ", "-").replace(" ", "-"))

    def losses(self) -> dict[str, float]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def train(self, arm: str, programs: dict[tuple[str, str], Machine]) -> None:
        """A run to the end of the stage, if it is not there: the first network from random weights, all others from it.
        `programs`: one compiled step per stage and arm, for all tasks and seeds."""
        run, stage = self.run(arm), STAGES[self.stage]
        checkpoints = Checkpoints(run.checkpoints, keep=2)
        if stage.end in checkpoints.steps():
            return
        fork = None if run.path == self.first else self.first
        session = open_session(config(self.task, self.text, self.seed, stage, FORKS.get(arm, BF16), fork))
        if (self.stage, arm) not in programs:
            programs[self.stage, arm] = build(session)
        machine = replace(programs[self.stage, arm], session=session)
        state, step = starting_state(machine, checkpoints, run)
        run.write_config(session.cfg, {"compute_dtype": session.compute_dtype})
        data = open_data(session.cfg, session.tokenizer)
        with Bar(f"training {run.path}", stage.end - step) as bar:
            for batch in data.iterate(step):
                state, _ = machine.train_step(step, state, batch)
                step += 1
                if step in (stage.start, stage.end):
                    checkpoints.save(step, state)
                bar.advance()
                if step == stage.end:
                    break
        checkpoints.close()

    def evaluate(self) -> None:
        """Held-out losses that are not in the file yet, all by the same forward pass on the same rows."""
        losses = self.losses()
        arms = [
            "bf16",
            BEFORE,
            *(arm for block in BLOCKS.values() for arm in block),
            *(f"{arm}, its masters in bf16" for arm in FORKS),
        ]
        todo = [arm for arm in arms if arm not in losses]
        if not todo:
            return
        session = open_session(self.run("bf16").load_config())
        data = open_data(session.cfg, session.tokenizer)
        evaluator = Evaluator(session, data)
        params, _ = load_params(session, self.run("bf16"), STAGES[self.stage].end)
        calibration = calibration_of(session, params, data, CALIBRATION_BATCHES)
        with Bar(f"evaluating {self.path}", len(todo), "arm") as bar:
            for arm in todo:
                losses[arm] = evaluator.of_served(self.weights(arm, session, params, calibration))["held_out_loss"]
                self.file.write_text(json.dumps(losses, indent=1) + "\n")
                bar.advance(1)

    def weights(self, arm: str, session: Session, params: dict[str, Array], calibration: Calibration) -> Weights:
        """What an arm would serve."""
        stage = STAGES[self.stage]
        name, _, masters = arm.partition(", its masters")
        if name in FORKS:
            return load_weights(f"{self.run(name).path}@{stage.end}:{'bf16' if masters else 'int4'}")
        if name == BEFORE:
            return load_weights(f"{self.first}@{stage.start}:bf16")
        if name == "bf16":
            values = params
        else:
            opened = partial(open_data, session.cfg, session.tokenizer)
            values = baseline(session, params, name, opened, calibration).fake(params, session.specs)
        return Weights(
            name, session.cfg.model, served_plain(session, values), session.tokenizer, session.compute_dtype, session.platform
        )


def interval(values: list[float]) -> list[float]:
    """Mean and its 95 % interval (Student's)."""
    n, mean = len(values), float(np.mean(values))
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return [mean, mean - half, mean + half]


def summary(losses: list[dict[str, float]]) -> dict[str, dict]:
    """Per block and arm: the losses of all seeds, the paired gap to the control, and the share of the gap of rounding to
    nearest that the arm recovers, where that gap is told from zero."""
    out = {}
    for block, arms in BLOCKS.items():
        gaps = {arm: [cell[arm] - cell["bf16"] for cell in losses] for arm in arms}
        rounded = gaps[arms[0]]
        measurable = interval(rounded)[1] > 0
        out[block] = {
            arm: {
                "losses": [cell[arm] for cell in losses],
                "gap": interval(gaps[arm]),
                "recovered": interval([1 - g / r for g, r in zip(gaps[arm], rounded)]) if measurable else None,
            }
            for arm in arms
        }
    return out


def show(task: str, losses: list[dict[str, float]], blocks: dict[str, dict]) -> Table:
    table = Table(title=f"{task}: held-out loss, {len(losses)} seeds, 95 % intervals", box=SIMPLE)
    for column in ("arm", "loss", "gap to bf16", "recovered"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    table.add_row("bf16, as many tokens", f"{np.mean([cell['bf16'] for cell in losses]):.4f}", "", "")
    table.add_row(BEFORE, f"{np.mean([cell[BEFORE] for cell in losses]):.4f}", "", "")
    for arms in blocks.values():
        table.add_section()
        for arm, row in arms.items():
            share = "not measurable" if row["recovered"] is None else "{:.0%} ({:.0%} to {:.0%})".format(*row["recovered"])
            table.add_row(arm, f"{np.mean(row['losses']):.4f}", "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["gap"]), share)
    return table


def draw(results: dict[str, dict], path: Path) -> None:
    """Gaps to the control with their intervals, a panel per task and block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), len(BLOCKS), figsize=(11, 3.2 * len(results)), squeeze=False, constrained_layout=True
    )
    for row, (task, blocks) in zip(axes, results.items()):
        for panel, (block, arms) in zip(row, blocks.items()):
            for at, (arm, found) in enumerate(arms.items()):
                mean, low, high = found["gap"]
                colour = "tab:orange" if arm in FORKS else "tab:blue"
                panel.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
            panel.set_yticks(range(len(arms)), [arm.removesuffix(", 3 bits") for arm in arms])
            panel.invert_yaxis()
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set(title=f"{task}, {block}", xlabel="held-out loss above the bf16 control (nats)")
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain text file, a megabyte or more")
    parser.add_argument("--work", type=Path, default=Path("runs/quant_table"), help="where runs and losses are kept")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--write", action="store_true", help="put the result under bench/results/")
    args = parser.parse_args()
    if args.write and len(args.seeds) < 2:
        parser.error("--write needs two seeds or more: intervals are of the differences between them")
    start_jax()
    keep_freed_memory()
    results, every, programs = {}, {}, {}
    for stage in STAGES:
        cells = [Cell(args.work, stage, task, args.text, seed) for seed in args.seeds for task in args.tasks]
        for arm in ("bf16", *FORKS):
            for cell in cells:
                cell.train(arm, programs)
        for cell in cells:
            cell.evaluate()
            every[f"{stage}, {cell.task}, seed {cell.seed}"] = cell.losses()
        for task in args.tasks:
            losses = [cell.losses() for cell in cells if cell.task == task]
            if len(losses) > 1:
                name = f"{task}, QAT {stage}"
                results[name] = summary(losses)
                console.print(show(name, losses, results[name]))
    if args.write:
        cfg = config("text", args.text, 0, STAGES[FIRST])
        facts = {
            "machine": machine(),
            "text": f"{Path(args.text).name}, {Path(args.text).stat().st_size} bytes",
            "stages": {name: vars(stage) for name, stage in STAGES.items()},
            "tokens_per_step": cfg.train.batch_size * cfg.train.seq_len,
            "parameters": sum(spec.size for spec in param_specs(cfg.model).values()),
            "calibration_batches": CALIBRATION_BATCHES,
            "seeds": list(args.seeds),
        }
        (RESULTS / "quant_table.json").write_text(json.dumps(facts | {"results": results, "losses": every}, indent=1) + "\n")
        draw(results, RESULTS / "quant_table.png")


if __name__ == "__main__":
    main()
