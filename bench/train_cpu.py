"""Tokens per second of a whole training step on a CPU: ours against transformers with torch, and against the matmul limit.

    python -m bench.train_cpu [--peers-python PATH] [--shapes tiny] [--dtypes float32] [--first-step] [--write]

Ours does everything (Muon on experts, INT4 on the grid, QK-Clip, router bias, balance loss); the peer (bench/torch_peer.py)
does less. The limit is as many products of matrices as a step has useful operations. Every contender has a process of its
own, in the Python that suits it (--peers-python: one with the peers extra),
and trains on the same rows of the same shape; they step in turns, one at a time, and the fastest step counts, because other
work on a machine can only slow one down. Processor time is beside it: it counts both cores, and leaves out what others use.

--first-step instead starts `launch.py train` and waits for the first line of a step, with an empty compilation cache and
with a filled one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from bench import measure
from bench.shapes import MATMUL, SHAPES, config, limit, random_batch, step_flops
from bench.turns import ROOT, Contender, fastest, serve
from train.compat import keep_freed_memory, start_jax
from train.machine import build
from train.session import open_session
from train.state import initial_state
from train.step import StepConfig, gradients

EXPERTS = ("eager", "grouped_mm")
"""transformers' expert implementations that run here; `batched_mm` copies weights per token (11 GB on the first shape)."""

PRECISIONS = {"float32": ("float32",), "bfloat16": ("autocast", "bfloat16")}
"""The peer's: bfloat16 products over float32 weights as ours, or all of it in bfloat16, which is less."""

COMPILED = ("uncompiled", "compiled")
VARIANTS = {*EXPERTS, *itertools.chain(*PRECISIONS.values()), *COMPILED}


def ours(shape: str, dtype: str) -> None:
    """Our contender: answers step, pull (forward and backward alone) and matmul."""
    start_jax("cpu")
    keep_freed_memory()
    cfg = config(shape, dtype)
    session = open_session(cfg)
    machine = build(session)
    held = {"state": initial_state(cfg, session.specs, machine.optimizer, session.mesh)}
    batch = jax.device_put(random_batch(cfg))
    step_cfg = StepConfig(cfg, session.compute_dtype, session.platform, session.mesh)
    compiled = jax.jit(lambda params: gradients(params, batch, jnp.float32(1), step_cfg)[:2])
    x, y = (jnp.asarray(m, dtype) for m in MATMUL)
    product = jax.jit(jnp.dot)

    def step() -> float:
        held["state"], metrics = machine.train_step(0, held["state"], batch)
        return float(metrics["loss"])

    def pull() -> float:
        return float(jax.block_until_ready(compiled(held["state"].params))[0])

    serve(
        {"python": sys.version.split()[0], "jax": jax.__version__, "threads": os.cpu_count()},
        {"step": step, "pull": pull, "matmul": limit(cfg, lambda: jax.block_until_ready(product(x, y)))},
    )


def contenders(dtype: str, without: list[str]) -> list[str]:
    """The peers."""
    each = itertools.product(PRECISIONS[dtype], EXPERTS, COMPILED)
    return [
        f"torch {experts} {precision} {how}" for precision, experts, how in each if not {experts, precision, how} & {*without}
    ]


def compare(shape: str, dtype: str, rounds: int, peers: str, without: list[str]) -> dict:
    """One row: tokens per second of each contender and what they come to."""
    cfg, torch = config(shape, dtype), contenders(dtype, without)
    sides = {"ours": Contender(sys.executable, "-m", "bench.train_cpu", "--serve", shape, dtype)}
    sides |= {name: Contender(peers, "-m", "bench.torch_peer", shape, dtype, *name.split()[1:]) for name in torch}
    steps, pulls, limits = fastest(sides, ("step", "pull", "matmul"), rounds)
    for side in sides.values():
        side.close()
    tokens = cfg.train.batch_size * cfg.train.seq_len
    fastest_products, busy = (min(of_one) for of_one in zip(*limits.values()))
    rows = {
        side: {
            "tokens_per_s": round(tokens / steps[side][0]),
            "step_ms": round(1e3 * steps[side][0], 1),
            "step_cpu_ms": round(1e3 * steps[side][1], 1),
            "forward_backward_ms": round(1e3 * pulls[side][0], 1),
            "forward_backward_cpu_ms": round(1e3 * pulls[side][1], 1),
            "matmul_gflops": round(step_flops(cfg) / limits[side][0] / 1e9),
        }
        for side in sides
    }
    peer = max(torch, key=lambda side: rows[side]["tokens_per_s"])
    frugal = min(torch, key=lambda side: rows[side]["step_cpu_ms"])
    return {
        "shape": shape,
        "dtype": dtype,
        "cpu": measure.cpu(),
        "rounds": rounds,
        "tokens": tokens,
        "flops": step_flops(cfg),
        "sides": rows,
        "best_peer": peer,
        "ratio": round(rows["ours"]["tokens_per_s"] / rows[peer]["tokens_per_s"], 2),
        "ratio_of_processor_time": round(rows[frugal]["step_cpu_ms"] / rows["ours"]["step_cpu_ms"], 2),
        "matmul_gflops": round(step_flops(cfg) / fastest_products / 1e9),
        "share_of_limit": round(fastest_products / pulls["ours"][0], 3),
        "share_of_limit_in_processor_time": round(busy / pulls["ours"][1], 3),
        "versions": {"ours": sides["ours"].versions, "peer": sides[peer].versions},
    }


def first_step() -> dict[str, float]:
    """Seconds from the command to the first line of a step of the tiny preset: the middle one of three starts."""
    starts = [one_start() for _ in range(3)]
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}


def one_start() -> dict[str, float]:
    """With an empty compilation cache, and with what that left."""
    with tempfile.TemporaryDirectory() as folder:

        def once(name: str) -> float:
            command = [sys.executable, "launch.py", "train", "--preset", "tiny", "--run", f"{folder}/{name}"]
            start = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"HOME": folder}
            )
            if not any(re.search(r"step +1/", line) for line in process.stdout):
                raise SystemExit(f"{' '.join(command)} ended with exit code {process.wait()} before its first step")
            seconds = time.perf_counter() - start
            process.terminate()
            process.communicate()
            return round(seconds, 1)

        return {"empty_cache_s": once("first"), "filled_cache_s": once("second")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(ROOT, ".venv-peers/bin/python")
    parser.add_argument("--peers-python", default=str(beside) if beside.exists() else sys.executable)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--without", nargs="+", default=[], help="leave peers out: compiled, eager, autocast, ...")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--write", action="store_true", help="add to bench/results, replacing rows of the same question")
    parser.add_argument("--serve", nargs=2, metavar=("SHAPE", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return ours(*args.serve)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    if not shutil.which(args.peers_python):
        parser.error(f"--peers-python {args.peers_python} is no program; name a Python with the peers extra")
    if unknown := set(args.without) - VARIANTS:
        parser.error(f"--without {', '.join(sorted(unknown))}: no such variant; there are {', '.join(sorted(VARIANTS))}")
    for dtype in args.dtypes:
        if not contenders(dtype, args.without):
            parser.error(f"--without {' '.join(args.without)} leaves no peer for {dtype}")
    rows = []
    if args.first_step:
        rows.append({"cpu": measure.cpu(), "first_step": (start := first_step())})
        print(
            f"first step of the tiny preset after {start['empty_cache_s']} s, with a filled compilation cache after "
            f"{start['filled_cache_s']} s"
        )
    for shape, dtype in [] if args.first_step else [(shape, dtype) for shape in args.shapes for dtype in args.dtypes]:
        rows.append(row := compare(shape, dtype, args.rounds, args.peers_python, args.without))
        print(
            f"{shape}, {dtype}: {row['ratio']} x {row['best_peer']}, {row['ratio_of_processor_time']} x in processor time; "
            f"forward and backward at {row['share_of_limit']:.0%} of {row['matmul_gflops']} GFLOP/s",
            flush=True,
        )
        for name, side in row["sides"].items():
            print(
                f"  {name:36} {side['tokens_per_s']:>7} tokens/s   step {side['step_ms']:>8.1f} ms (processor "
                f"{side['step_cpu_ms']:>8.1f})   forward and backward {side['forward_backward_ms']:>8.1f} ms",
                flush=True,
            )
    if args.write:
        print(f"wrote {measure.write('train_cpu', rows, question=('shape', 'dtype', 'cpu')).name}")


if __name__ == "__main__":
    main()
