"""Model FLOP utilisation and tokens per second of a whole training step on one accelerator, and what each part of it costs.

    python -m bench.train_gpu [--preset one_gpu] [--rounds 5] [--only VARIANT,...] [--write] [--section.field value ...]
    python -m bench.train_gpu --plot docs/images/step-parts.png        from results written before

Variants of the step take turns on the same state and batch: everything, then without the INT4 grid, without QK-Clip (its
maxima included), without Newton-Schulz, and forward and backward alone. A part's cost is the time that the step without it
saves. MFU is that of metrics.jsonl: useful FLOPs (train/counts.py) over the chip's bf16 peak. Tokens are random, so experts
are loaded as an untrained router loads them; the load is printed beside the numbers. It runs on a CPU too, with a small
preset; other work on the machine then counts, so rounds take turns and the median is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import numpy as np
import tyro

from bench import measure
from bench.shapes import random_batch
from configs.presets import preset
from configs.schema import ConfigError, RunConfig
from train.compat import interpreter, keep_freed_memory, known_options, start_jax
from train.compiler_options import step_options
from train.counts import train_flops_per_token
from train.mesh import batch_sharding
from train.metrics import peak_flops
from train.program import step_program
from train.session import Session, open_session
from train.state import TrainState, initial_state
from train.step import gradients

VARIANTS = {
    "everything": lambda cfg: cfg,
    "without QAT": lambda cfg: replace(cfg, quant=replace(cfg.quant, grid="none")),
    "without QK-Clip": lambda cfg: replace(cfg, optim=replace(cfg.optim, qk_clip_tau=None)),
    "without Newton-Schulz": lambda cfg: cfg,
}
GRADIENTS = "forward and backward"
ALL = (*VARIANTS, GRADIENTS)


def defaults(name: str) -> RunConfig:
    """The preset with the grid on from the first step; one_gpu with half a million tokens per step, 32 rows at a time, for which
    an H200 has room."""
    cfg = preset(name)
    train = replace(cfg.train, batch_size=128, accumulate=4) if name == "one_gpu" else cfg.train
    return replace(cfg, quant=replace(cfg.quant, start_step=0, ramp_steps=0), train=train)


def lowered(name: str, session: Session, state: TrainState, batch: dict) -> Any:
    """The program of a variant, (state, batch) -> (state, what is measured) with the state donated, or of GRADIENTS,
    (params, batch) -> what needs all of them; ready to be compiled as the training loop compiles a step."""
    cfg = VARIANTS.get(name, VARIANTS["everything"])(session.cfg)
    program = step_program(cfg, session.specs, session.mesh, session.compute_dtype)
    settled = program.settles_at == 0
    options = known_options(step_options(session.mesh.devices.flat[0])) or None

    def run(state, batch):
        """Measurements that belong to the part left out are left out with it, so that nothing computes them."""
        state, metrics = program.step(settled)(state, batch)
        return state, {k: v for k, v in metrics.items() if name != "without QK-Clip" or k != "max_logit"}

    def pull(params, batch):
        """Of the gradients one number each."""
        loss, grads, _ = gradients(params, batch, np.float32(1), program.config(settled), jax.random.key(0))
        return loss, {path: abs(g).max() for path, g in grads.items()}

    if name == GRADIENTS:
        return jax.jit(pull, compiler_options=options).lower(state.params, batch)
    skipped = mock.patch("optim.muon.orthogonalize_tree", lambda tree, plan, **_: tree)
    with skipped if name == "without Newton-Schulz" else nullcontext():
        return jax.jit(run, compiler_options=options, donate_argnums=0).lower(state, batch)


def seconds_of(session: Session, rounds: int, chosen: Collection[str]) -> tuple[dict[str, list[float]], dict]:
    """Seconds of every round of every chosen variant, in turns, and the last measurements of the whole step."""
    cfg = session.cfg
    optimizer = step_program(cfg, session.specs, session.mesh, session.compute_dtype).optimizer
    state = initial_state(cfg, session.specs, optimizer, session.mesh)
    batch = jax.device_put(random_batch(cfg), batch_sharding(session.mesh))
    start = time.perf_counter()
    traced = {name: lowered(name, session, state, batch) for name in ALL if name in chosen}
    print(f"traced {len(traced)} programs in {time.perf_counter() - start:.0f} s", flush=True)
    with ThreadPoolExecutor() as pool:  # side by side, because a compiler seldom uses all cores of a host
        programs = dict(zip(traced, pool.map(lambda program: program.compile(), traced.values())))
    print(f"compiled them in {time.perf_counter() - start:.0f} s, tracing included", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            jax.block_until_ready(state)
            start = time.perf_counter()
            if name == GRADIENTS:
                jax.block_until_ready(program(state.params, batch))
            else:
                state, measured = program(state, batch)
                jax.block_until_ready((state, measured))
            took = time.perf_counter() - start
            print(f"round {turn} of {rounds}, {name}: {took:.3f} s{'' if turn else ', not counted'}", flush=True)
            if turn:
                seconds[name].append(took)
            if name == "everything":
                whole = jax.device_get(measured)
    return seconds, whole


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| step | ms | tokens/s | TF/s | MFU | the part costs |", "|---|---|---|---|---|---|"]
    for r in rows:
        mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else "n/a"
        cost = f"{100 * r['cost']:.1f} %" if r["cost"] is not None else ""
        lines.append(f"| {r['variant']} | {r['ms']:.1f} | {r['tokens_per_s']:.0f} | {r['tflops']:.1f} | {mfu} | {cost} |")
    return "\n".join(lines)


def plot(file: str) -> None:
    """Stacked bars, one per result written with all variants: where the milliseconds of a step go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    labelled = False
    for path in sorted(measure.RESULTS.glob("step-*.json")):
        (facts, *rows), machine = (content := json.loads(path.read_text()))["rows"], content["machine"]
        ms = {row["variant"]: row["ms"] for row in rows}
        if set(ms) != set(ALL):
            continue
        saved = {name.removeprefix("without "): max(ms["everything"] - ms[name], 0) for name in ms if name.startswith("without")}
        of_gradients = saved.pop("QAT")
        update = ms["everything"] - ms[GRADIENTS] - sum(saved.values())
        parts = {
            "forward and backward": ms[GRADIENTS] - of_gradients,
            "QAT": of_gradients,
            **saved,
            "rest of the update": max(update, 0),
        }
        start, whole = 0.0, sum(parts.values())  # of what the parts add up to, which differs from the step by the noise
        for i, (name, value) in enumerate(parts.items()):
            share = value / whole
            axes.barh(
                f"{facts['preset']}\n{machine['device']}", share, left=start, color=f"C{i}", label=None if labelled else name
            )
            start += share
        labelled = True
    axes.set_xlabel("share of the step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="one_gpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(ALL)}; everything is always measured")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plot", default="")
    args, fields = parser.parse_known_args()
    if args.plot:
        return plot(args.plot)
    only = {"everything", *args.only.split(",")} if args.only else set(ALL)
    if unknown := sorted(only - set(ALL)):
        parser.error(f"--only {', '.join(unknown)}: no such variant; there are {', '.join(ALL)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    start_jax()
    try:
        default = defaults(args.preset)
    except ConfigError as error:
        parser.error(str(error))
    cfg = tyro.cli(RunConfig, default=default, args=fields, prog=f"bench.train_gpu --preset {args.preset}")
    try:
        session = open_session(cfg.checked())
    except ConfigError as error:
        parser.error(str(error))
    if session.platform == "cpu":
        keep_freed_memory()
    seconds, measured = seconds_of(session, args.rounds, only)

    tokens = cfg.train.batch_size * cfg.train.seq_len
    flops = tokens * train_flops_per_token(cfg.model, session.specs, cfg.train.seq_len)
    peak = peak_flops(jax.devices()[0].device_kind)
    whole = statistics.median(seconds["everything"])
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        rows.append(
            {
                "variant": name,
                "ms": round(1e3 * middle, 2),
                "spread_ms": round(1e3 * (max(times) - min(times)), 2),
                "tokens_per_s": round(tokens / middle, 1),
                "tflops": round(flops / middle / 1e12, 4),
                "mfu": round(flops / middle / peak / jax.device_count(), 4) if peak else None,
                "cost": round(1 - middle / whole, 4) if name.startswith("without") else None,
            }
        )
    facts = {
        "preset": args.preset,
        "overrides": fields,
        "tokens_per_step": tokens,
        "seq_len": cfg.train.seq_len,
        "parameters": sum(spec.size for spec in session.specs.values()),
        "flops_per_step": flops,
        "compute_dtype": session.compute_dtype,
        "versions": interpreter(),
        "load_max_over_mean": round(float(np.max(measured["load_max_over_mean"])), 2),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    print(
        f"{args.preset}: {facts['parameters'] / 1e9:.2f} B parameters, {tokens} tokens a step in rows of {cfg.train.seq_len}, "
        f"busiest expert at {facts['load_max_over_mean']} of the mean, {jax.devices()[0].device_kind}"
    )
    print(table(rows))
    if args.write:  # a part of the variants does not take the place of all
        part = "" if only == set(ALL) else "-" + args.only.replace(",", "+").replace(" ", "-")
        print(f"wrote {measure.write(f'step-{args.preset}{part}', [facts, *rows]).name}")


if __name__ == "__main__":
    main()
