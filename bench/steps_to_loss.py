"""Steps to reach a loss: Muon against AdamW on real text, bf16 and on the INT4 grid, learning rate swept for each.

    python -m bench.steps_to_loss TEXT_FILE [--work DIR] [--minutes 9] [--write]

Four arms (rule x grid). Every arm sweeps its learning rate in factors of two with one seed until the best one has a
worse neighbour on both sides, then repeats the best one (without the grid its neighbours too) with two more seeds. The
rate is constant after the warm-up, so that one curve answers for every number of steps. Finished runs lie in DIR and are
not repeated: the same command goes on where the last one stopped. With --write the result and its picture go to
bench/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.measure import RESULTS, machine
from configs.presets import preset
from configs.schema import DataConfig, QuantConfig, RunConfig
from data.pipeline import open_data
from train.held_out import Evaluator
from train.machine import build
from train.session import open_session
from train.state import initial_state

ARMS = tuple((rule, grid) for grid in ("none", "int4") for rule in ("muon", "adamw"))
FIRST_RATES = (2, 3)
"""Of the sweep without the grid, as powers of two times 1e-3; with the grid it starts at the best rate without."""
SEEDS = (0, 1, 2)
STEPS, EVERY, WARMUP = 240, 8, 20
EVAL_BATCHES = 4
LAST = 5
"""Evaluations at the end of a run whose mean is its final loss."""
T_95 = 4.303
"""Student's t for two degrees of freedom: a 95 % interval from three seeds."""


def config(text: str, rule: str, grid: str, lr: float, seed: int) -> RunConfig:
    """tiny at half its widths (0.6 M parameters): 240 steps of 2,048 bytes are less than one epoch of the text."""
    base = preset("tiny")
    return replace(
        base,
        model=replace(
            base.model,
            hidden_size=64,
            intermediate_size=192,
            moe_intermediate_size=64,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
        ),
        optim=replace(base.optim, matrices=rule, lr=lr, schedule="constant", warmup_steps=WARMUP),
        quant=QuantConfig(grid=grid),
        data=DataConfig(paths=(text,), seed=seed),
        train=replace(base.train, steps=STEPS, batch_size=16, seq_len=128, seed=seed),
    )


def train_curves(text: str, rule: str, grid: str, lr: float, seeds: list[int]) -> dict[int, list[float]]:
    """Held-out loss after every EVERY steps, per seed; the seed draws the weights and the order of the text. All seeds
    share one compiled step. The held-out loss is that of the weights which would be served."""
    out, machinery = {}, None
    for seed in seeds:
        session = open_session(config(text, rule, grid, lr, seed), "float32")
        data = open_data(session.cfg, session.tokenizer)
        machinery = machinery or build(session)
        state = initial_state(session.cfg, session.specs, machinery.optimizer, session.mesh)
        evaluate, curve = Evaluator(session, data), []
        for step, batch in zip(range(1, STEPS + 1), data.iterate(0), strict=False):
            state, _ = machinery.train_step(step - 1, state, batch)
            if step % EVERY == 0:
                amount = float(grid != "none")
                curve.append(evaluate(state.params, amount=amount, batches=EVAL_BATCHES)["held_out_loss"])
        out[seed] = [round(loss, 5) for loss in curve]
    return out


class Study:
    """The finished runs of a working directory, and which are still to do."""

    def __init__(self, text: str, work: Path):
        self.text, self.work = text, work
        work.mkdir(parents=True, exist_ok=True)

    def _file(self, rule: str, grid: str, power: int, seed: int) -> Path:
        return self.work / f"{rule}-{grid}-{power}-{seed}.json"

    def curves(self, rule: str, grid: str) -> dict[tuple[int, int], list[float]]:
        """(power, seed) -> losses."""
        found = {}
        for file in sorted(self.work.glob(f"{rule}-{grid}-*.json")):
            power, seed = file.stem.removeprefix(f"{rule}-{grid}-").rsplit("-", 1)
            found[int(power), int(seed)] = json.loads(file.read_text())
        return found

    def missing(self, rule: str, grid: str) -> tuple[int, list[int]] | None:
        """The next rate of an arm with the seeds it lacks, None when the arm is complete."""
        done = self.curves(rule, grid)
        first = FIRST_RATES if grid == "none" else (best_power(self.curves(rule, "none")),)
        best = best_power(done) if done else first[0]
        for power in (*first, best - 1, best, best + 1):
            if (power, SEEDS[0]) not in done:
                return power, [SEEDS[0]]
        for power in (best, best - 1, best + 1) if grid == "none" else (best,):
            if lacking := [seed for seed in SEEDS if (power, seed) not in done]:
                return power, lacking
        return None

    def advance(self, minutes: float) -> bool:
        """Run what is missing until the time is over; whether all is done."""
        end = time.monotonic() + 60 * minutes
        for rule, grid in ARMS:
            while (todo := self.missing(rule, grid)) is not None:
                if time.monotonic() > end:
                    return False
                power, seeds = todo
                start = time.monotonic()
                for seed, curve in train_curves(self.text, rule, grid, rate_of(power), seeds).items():
                    self._file(rule, grid, power, seed).write_text(json.dumps(curve))
                    print(
                        f"{rule} {grid} lr {rate_of(power):g} seed {seed}: {final(curve):.4f} ({time.monotonic() - start:.0f} s)",
                        file=sys.stderr,
                        flush=True,
                    )
        return True


def rate_of(power: int) -> float:
    return 1e-3 * 2.0**power


def final(curve: list[float]) -> float:
    """Mean of the last evaluations; a run that diverged counts as infinitely bad."""
    mean = float(np.mean(curve[-LAST:]))
    return mean if np.isfinite(mean) else float("inf")


def best_power(done: dict[tuple[int, int], list[float]]) -> int:
    """The rate with the lowest final loss, mean over its seeds."""
    powers = {power for power, _ in done}
    return min(powers, key=lambda p: np.mean([final(curve) for (power, _), curve in done.items() if power == p]))


def steps_to(curve: list[float], target: float) -> float:
    """Steps until the loss is first at or under the target, between two evaluations by a straight line; NaN if never."""
    below = [i for i, loss in enumerate(curve) if loss <= target]
    if not below:
        return float("nan")
    i = below[0]
    if i == 0:
        return float(EVERY)
    share = (curve[i - 1] - target) / (curve[i - 1] - curve[i])
    return EVERY * (i + share)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of it."""
    mean, half = float(np.mean(values)), T_95 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def compare(study: Study, grid: str) -> dict:
    """Both rules at their best rates. Seeds are pairs: the same text in the same order, the same first weights. The target
    of a pair is the final loss of its AdamW run; the ratio's interval is that of the mean logarithm."""
    arms = {rule: study.curves(rule, grid) for rule in ("muon", "adamw")}
    best = {rule: best_power(done) for rule, done in arms.items()}
    at_best = {rule: [arms[rule][best[rule], seed] for seed in SEEDS] for rule in arms}
    targets = [final(curve) for curve in at_best["adamw"]]
    steps = {
        rule: [steps_to(curve, target) for curve, target in zip(curves, targets, strict=True)] for rule, curves in at_best.items()
    }
    ratios = np.log(np.array(steps["muon"]) / np.array(steps["adamw"]))
    return {
        "grid": grid,
        "targets": [round(t, 4) for t in targets],
        "steps": steps,
        "ratio": [round(float(np.exp(x)), 3) for x in interval(list(ratios))],
        "rate": {rule: rate_of(power) for rule, power in best.items()},
        "final": {rule: interval([final(c) for c in curves]) for rule, curves in at_best.items()},
        "sweep": {
            rule: {
                f"{rate_of(p):g}": [round(final(c), 4) for (q, _), c in sorted(done.items()) if q == p]
                for p in sorted({p for p, _ in done})
            }
            for rule, done in arms.items()
        },
        "curves": at_best,
    }


def draw(results: list[dict], path: Path) -> None:
    """Per grid: the sweep, the curves at the best rates, and steps to every loss, with 95 % intervals of three seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(len(results), 3, figsize=(13, 3.6 * len(results)), constrained_layout=True)
    colours = {"muon": "tab:blue", "adamw": "tab:orange"}
    for row, result in zip(axes, results, strict=True):
        grid = {"none": "bf16 weights", "int4": "experts on the INT4 grid"}[result["grid"]]
        for rule, colour in colours.items():
            sweep = result["sweep"][rule]
            rates = [float(rate) for rate in sweep]
            row[0].plot(rates, [np.mean(v) for v in sweep.values()], "o-", color=colour, label=rule)
            for rate, values in sweep.items():
                row[0].plot([float(rate)] * len(values), values, ".", color=colour, alpha=0.5)
            curves = np.array(result["curves"][rule])
            at = EVERY * np.arange(1, curves.shape[1] + 1)
            half = T_95 * curves.std(0, ddof=1) / len(curves) ** 0.5
            row[1].plot(at, curves.mean(0), color=colour, label=f"{rule}, lr {result['rate'][rule]:g}")
            row[1].fill_between(at, curves.mean(0) - half, curves.mean(0) + half, color=colour, alpha=0.25)
            losses = np.linspace(max(curves.min(1).max(), min(result["targets"])), 2.8, 40)
            steps = np.array([[steps_to(list(curve), loss) for curve in curves] for loss in losses])
            half = T_95 * steps.std(1, ddof=1) / len(curves) ** 0.5
            row[2].plot(losses, steps.mean(1), color=colour, label=rule)
            row[2].fill_between(losses, steps.mean(1) - half, steps.mean(1) + half, color=colour, alpha=0.25)
        low = min(np.min(values) for sweep in result["sweep"].values() for values in sweep.values())
        row[0].set(
            xscale="log",
            xlabel="learning rate",
            ylabel="final held-out loss",
            title=grid,
            ylim=(low - 0.03, low + 0.6),
            xlim=(8e-4, 4e-2),
        )
        row[0].xaxis.set_minor_formatter(NullFormatter())
        row[1].set(xlabel="step", ylabel="held-out loss", title="at the best rates", ylim=(None, 3))
        row[2].set(
            xlabel="held-out loss", ylabel="steps to reach it", title="ratio {:.2f} ({:.2f} to {:.2f})".format(*result["ratio"])
        )
        row[2].invert_xaxis()
        for panel in row:
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain text file, a megabyte or more")
    parser.add_argument("--work", type=Path, default=Path("runs/steps_to_loss"), help="where finished runs are kept")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop before the next run after this long")
    parser.add_argument("--write", action="store_true", help="put the result under bench/results/")
    args = parser.parse_args()
    study = Study(args.text, args.work)
    if not study.advance(args.minutes):
        sys.exit("not finished; the same command goes on")
    results = [compare(study, grid) for grid in ("none", "int4")]
    for result in results:
        print(
            "experts {}: to losses {} Muon takes {:.2f} ({:.2f} to {:.2f}) of AdamW's steps".format(
                result["grid"], result["targets"], *result["ratio"]
            ),
            json.dumps(result["final"]),
        )
    if args.write:
        file = Path(args.text)
        facts = {
            "machine": machine(),
            "text": f"{file.name}, {file.stat().st_size} bytes",
            "steps": STEPS,
            "tokens_per_step": 2048,
        }
        (RESULTS / "steps_to_loss.json").write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
        draw(results, RESULTS / "steps_to_loss.png")


if __name__ == "__main__":
    main()
