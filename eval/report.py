"""`launch.py report`: one page about a run, drawn from its own files: config.json, metrics.jsonl, evals.jsonl."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

from configs.schema import ConfigError
from eval.horizon import cells, steps_right
from eval.results import read_result, read_rows
from eval.statistics import interval
from train.console import clock, console, human
from train.metrics import number
from train.run_dir import RunDir, config_hash

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

INK = ("#1f4e79", "#c55a11", "#548235", "#7f6000", "#7030a0", "#404040")
LOOKS = tuple((colour, line) for line in ("-", "--", ":") for colour in INK)
"""Colour and line of one arm after the other."""


def write_report(path: Path) -> int:
    """Write report.md and its pictures into the run directory; ConfigError if the run has no steps yet."""
    run = RunDir(path)
    facts = run.load_facts()
    rows = [{name: number(value) for name, value in row.items()} for row in run.read_metrics()]
    steps = [r for r in rows if r["kind"] == "step"]
    if not steps:
        raise ConfigError(f"{run.metrics} holds no steps yet; train first")
    evals = _last_evals(run)
    pictures = {"loss": _loss(steps, [r for r in rows if r["kind"] == "eval"]), "expert_load": _load(steps)}
    if measured := [r for r in steps if "optimizer_seconds" in r]:  # none in a run of a few steps
        pictures["optimizer_share"] = _optimizer_share(measured)
    if any("grid_error" in r for r in steps):  # else no group divides the widths of a run without a grid
        pictures["grid"] = _grid(steps)
    if any("exact" in e for e in evals):
        pictures["accuracy"] = _accuracy(evals)
    chains = run.path / "horizon.json"
    played = read_result(chains)
    if played:
        pictures |= {"horizon": _horizon(played), "kl_by_position": _kl_by_position(played)}
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)
    (run.path / "report.md").write_text(_page(run, facts, steps, rows, evals, list(pictures), played))
    if chains.exists() and not played:
        console.print(f"{chains} is cut off and left out; play the chains again: eval --suite horizon", markup=False)
    console.print(f"wrote {run.path / 'report.md'} and {len(pictures)} plots", markup=False)
    return 0


def _last_evals(run: RunDir) -> list[dict[str, Any]]:
    """The newest line of every arm, in the order in which the arms first came."""
    rows = [row for row in read_rows(run.path / "evals.jsonl") if "arm" in row]
    return list({row["arm"]: row | {"held_out_loss": number(row.get("held_out_loss", "nan"))} for row in rows}.values())


def _axes(xlabel: str, ylabel: str, title: str):
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _series(steps: list[dict], name: str) -> tuple[list[int], list[Any]]:
    have = [r for r in steps if isinstance(r.get(name), (int, float, list))]
    return [r["step"] for r in have], [r[name] for r in have]


def _loss(steps, evals):
    figure, axes = _axes("optimizer step", "loss (nats per trained token)", "Loss")
    axes.plot(*_series(steps, "loss"), color=INK[0], linewidth=1, label="training")
    if evals:
        axes.plot([r["step"] for r in evals], [r["held_out_loss"] for r in evals], "o", color=INK[1], label="held out")
    on_grid = [r["step"] for r in steps if r.get("grid_amount", 0) > 0]
    if on_grid:
        axes.axvspan(on_grid[0], steps[-1]["step"], color=INK[2], alpha=0.12, label="experts on the grid")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def _load(steps):
    figure, axes = _axes("optimizer step", "busiest expert over mean", "Expert load, per MoE layer (1 is perfect balance)")
    at, values = _series(steps, "load_max_over_mean")
    layers = len(values[0])
    few = layers <= len(INK)
    named = range(layers) if few else (0, layers // 2, layers - 1)  # a legend of sixty layers would hide them
    for layer in range(layers):
        colour = INK[layer] if few else plt.get_cmap("viridis")(layer / layers)
        label = f"MoE layer {layer}" if layer in named else None
        axes.plot(at, [v[layer] for v in values], linewidth=1, color=colour, label=label)
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False)
    return figure


def _optimizer_share(measured):
    figure, axes = _axes("optimizer step", "percent of the step", "Optimizer's share of a step (Muon, AdamW, QK-Clip)")
    axes.plot(
        [r["step"] for r in measured],
        [100 * r["optimizer_seconds"] / r["seconds"] for r in measured],
        "o-",
        color=INK[0],
        linewidth=1,
    )
    _from_zero(axes)
    return figure


def _grid(steps):
    figure, axes = _axes("optimizer step", "relative RMS distance", "Distance of the masters from the grid")
    axes.plot(*_series(steps, "grid_error"), color=INK[0], linewidth=1)
    _from_zero(axes)
    return figure


def _from_zero(axes) -> None:
    """Zero at the bottom and room above: a line that hardly changes would otherwise lie on the frame."""
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.1 * highest if 0 < highest < float("inf") else None)


def _accuracy(evals):
    figure, axes = _axes("chain length n", "exact answers (%)", "Exact answers by chain length, 95 % intervals")
    arms = [e for e in evals if "exact" in e]
    for arm, (row, (colour, line)) in enumerate(zip(arms, cycle(LOOKS))):
        lengths = [int(n) for n in row["exact"]]
        shares = list(row["exact"].values())
        bounds = [interval(s, row["problems"]) for s in shares]
        errors = [
            [100 * max(s - lo, 0) for s, (lo, _) in zip(shares, bounds)],
            [100 * max(hi - s, 0) for s, (_, hi) in zip(shares, bounds)],
        ]
        axes.errorbar(
            [n + 0.12 * (arm - (len(arms) - 1) / 2) for n in lengths],
            [100 * s for s in shares],
            errors,
            fmt="o" + line,
            color=colour,
            linewidth=1,
            capsize=3,
            label=row["arm"],
        )
    axes.set_ylim(0, 105)
    axes.legend(frameon=False)
    return figure


def _horizon(played):
    figure, (axes, steps) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=(1.7, 1))
    lengths, counts = [int(n) for n in played["problems"]], list(played["problems"].values())
    arms = list(zip(played["arms"], cycle(LOOKS)))
    for arm, (row, (colour, line)) in enumerate(arms):
        points = list(row["by_length"].values())
        shares = [100 * point["success"] for point in points]
        bounds = [(100 * lo, 100 * hi) for lo, hi in (point["interval"] for point in points)]
        errors = [[max(s - lo, 0) for s, (lo, _) in zip(shares, bounds)], [max(hi - s, 0) for s, (_, hi) in zip(shares, bounds)]]
        axes.errorbar(
            [n * 1.05 ** (arm - (len(arms) - 1) / 2) for n in lengths],
            shares,
            errors,
            fmt="o" + line,
            color=colour,
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            capsize=2,
        )
    axes.axvspan(*played["trained_lengths"], color="#404040", alpha=0.08)
    axes.text(played["trained_lengths"][0], 3, " trained lengths", fontsize=8, color="#404040")
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{n}\n({count})" for n, count in zip(lengths, counts)])
    axes.set_ylim(0, 105)
    axes.minorticks_off()
    axes.set(
        xlabel="chain length n (chains played)",
        ylabel="right to the end (%)",
        title=f"{played['task']}: right answers, 95 % intervals",
    )

    for at, (row, (colour, line)) in enumerate(arms):
        wrong, low, high = (1000 * (1 - share) for share in steps_right(row))
        steps.plot([max(high, 1e-6), max(low, 1e-6)], [at, at], line, color=colour, linewidth=1.5)
        steps.plot(wrong or low, at, "o" if wrong else "<", color=colour)
        steps.annotate(
            f"{wrong:.3g}" if wrong else f"0 seen, < {low:.2g}",
            (wrong or low, at),
            (0, 6),
            fontsize=8,
            textcoords="offset points",
            color=colour,
            ha="center",
        )
    steps.set_yticks(range(len(arms)), [row["arm"] for row, _ in arms])
    for label, (_, (colour, _)) in zip(steps.get_yticklabels(), arms):
        label.set_color(colour)
    steps.set_xscale("log")
    least = min(1000 * (1 - steps_right(row)[1]) for row, _ in arms)
    steps.set_xlim(least / 30, 1500)
    steps.set_ylim(len(arms) - 0.5, -0.7)
    steps.set(xlabel="first wrong step, per 1,000 tried", title="What one step risks")
    for each in (axes, steps):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure


def _kl_by_position(played):
    first, *others = played["arms"]
    figure, axes = _axes("position in the row", f"KL from {first['arm']} (nats per token)", "Drift on the same text")
    for row, (colour, line) in zip(others, cycle(LOOKS[1:])):
        octaves = row["kl_by_octave"]
        axes.plot(
            [int(k) for k in octaves], list(map(float, octaves.values())), "o" + line, color=colour, linewidth=1, label=row["arm"]
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if others:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _chains(played: dict) -> list[str]:
    """The section about suite horizon."""
    lengths = ", ".join(f"{count} of n={n}" for n, count in played["problems"].items())
    context = f", in a context of {played['context']} tokens" if played["context"] else ""
    lines = [
        "## Long chains",
        "",
        f"Task {played['task']}, trained on {' to '.join(map(str, played['trained_lengths']))} steps; every chain is "
        f"played in a live loop with greedy replies{context}. Chains: {lengths}. Intervals of 95 %: Wilson for shares "
        "of chains and of calls, bootstrap over chains for the rest.",
        "",
    ]
    for rows in cells(played):
        lines += [*("| " + " | ".join(row) + " |" for row in rows), ""]
        lines.insert(len(lines) - len(rows), "|" + "---|" * len(rows[0]))
    if played["left_out"]:
        lines += [f"Left out for want of time: n = {', '.join(map(str, played['left_out']))}.", ""]
    return lines


def _page(
    run: RunDir, facts: dict, steps: list[dict], rows: list[dict], evals: list[dict], pictures: list[str], played: dict | None
) -> str:
    cfg, last = run.load_config(), steps[-1]
    rates = sorted(r["tokens_per_second"] for r in steps)
    updates = [100 * r["optimizer_seconds"] / r["seconds"] for r in steps if "optimizer_seconds" in r]
    held_out = [r for r in rows if r["kind"] == "eval"]
    lines = [
        f"# Run `{run.path.name}`",
        "",
        f"{cfg.model.num_hidden_layers} layers ({cfg.model.first_k_dense_replace} dense), {cfg.model.n_routed_experts} "
        f"experts of which {cfg.model.num_experts_per_tok} per token, on {facts.get('devices', 1)} x "
        f"{facts.get('device', '?')} in {facts.get('compute_dtype', '?')} ({facts.get('versions', '?')}). "
        f"Config hash `{config_hash(cfg)}`, data plan `{facts.get('plan_hash', '?')}`.",
        "",
        "| | |",
        "|---|---|",
        f"| optimizer steps | {last['step']} of {cfg.train.steps} |",
        f"| last training loss | {last['loss']:.4f} |",
        *(
            f"| held-out {k.removeprefix('held_out_').replace('_', ' ')} | {v:.4f} |"
            for k, v in (held_out[-1] if held_out else {}).items()
            if k not in ("kind", "step")
        ),
        f"| tokens per second, median step | {human(rates[len(rates) // 2])} |",
        f"| time in steps | {clock(sum(r['seconds'] for r in steps))} |",
        f"| seconds from command to first step | "
        f"{next((r['seconds_to_first_step'] for r in steps if 'seconds_to_first_step' in r), float('nan')):.1f} |",
        *([f"| optimizer's share of a step, median | {sorted(updates)[len(updates) // 2]:.1f} % |"] if updates else []),
        f"| dropped tokens | {sum(r['dropped_tokens'] for r in steps):.0f} |",
        f"| skipped steps | {last['skipped_steps']} |",
        "",
    ]
    lines += _results(evals)
    lines += _chains(played) if played else []
    for name in pictures:
        lines += [f"![{name.replace('_', ' ')}](plots/{name}.png)", ""]
    return "\n".join(lines)


def _results(evals: list[dict]) -> list[str]:
    if not evals:
        return []
    lengths = sorted({n for e in evals for n in e.get("exact", ())}, key=int)  # arms may come from different calls
    extra = ["bits per byte"] if any("bits_per_byte" in e for e in evals) else []
    head = ["weights", "held-out loss", *extra, *(["problems per length"] if lengths else []), *(f"n={n}" for n in lengths)]
    lines = ["## Weights side by side", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in evals:
        cells = [row["arm"], f"{row['held_out_loss']:.4f}"]
        if extra:
            cells.append(f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else "")
        if lengths:
            cells.append(str(row.get("problems", "")))
        for n in lengths:
            share = row.get("exact", {}).get(n)
            if share is None:
                cells.append("")
                continue
            lo, hi = interval(share, row["problems"])
            cells.append(f"{100 * share:.1f} % ({100 * lo:.0f}–{100 * hi:.0f})")
        lines.append("| " + " | ".join(cells) + " |")
    note = ["Exact answers on held-out problems, 95 % Wilson intervals."] if lengths else []
    return [*lines, "", *note, ""]
