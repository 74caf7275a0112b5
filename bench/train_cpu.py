"""Tokens per second of a whole training step on a CPU: ours against transformers with torch, and against the matmul limit.

    python -m bench.train_cpu [--write]        needs the peers extra

Ours does everything (Muon on experts, INT4 on the grid, QK-Clip, router bias, balance loss); the peer (bench/torch_peer.py)
does less. Every contender has a process of its own and trains on the same rows of the same shape; they step in turns, one
at a time, and the fastest step counts, because other work on a machine can only slow one down. The last part starts
`launch.py train` and waits for the first line of a step, with an empty compilation cache and with a filled one.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import measure
from configs.presets import preset
from configs.schema import ModelConfig, RunConfig
from model.transformer import param_specs
from train.compat import keep_freed_memory
from train.counts import train_flops_per_token
from train.loop import build
from train.session import open_session
from train.state import initial_state
from train.step import StepConfig, gradients

SHAPES = {
    "25M, 32 experts": (dict(vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, q_lora_rank=128,
                             kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
                             intermediate_size=1024, moe_intermediate_size=128, n_routed_experts=32,
                             num_experts_per_tok=4, routed_scaling_factor=1.996), 8, 256),
    "tiny": (dict(num_hidden_layers=3, num_experts_per_tok=2, routed_scaling_factor=1.412), 24, 96),
}
"""Model fields, rows, tokens per row. The first is the shape on which other trainers were measured before."""


EXPERTS = ("eager", "grouped_mm")
"""transformers' expert implementations that run here; `batched_mm` copies weights per token (11 GB on the first shape)."""


def config(shape: str, dtype: str) -> RunConfig:
    fields, rows, width = SHAPES[shape]
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny, model=ModelConfig(**fields), quant=dataclasses.replace(tiny.quant, start_step=0),
        train=dataclasses.replace(tiny.train, batch_size=rows, seq_len=width, compute_dtype=dtype, balance_loss=1e-3,
                                  layers="unroll"))


def random_batch(cfg: RunConfig) -> dict[str, np.ndarray]:
    shape = cfg.train.batch_size, cfg.train.seq_len
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(shape, np.float32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape), "segments": np.ones(shape, np.int32)}


def ours(cfg: RunConfig):
    """(a whole training step, forward and backward alone), each blocking and returning the loss."""
    keep_freed_memory()
    session = open_session(cfg)
    machine = build(session)
    held = {"state": initial_state(cfg, session.specs, machine.optimizer, session.mesh)}
    batch = jax.device_put(random_batch(cfg))
    step_cfg = StepConfig(cfg, session.compute_dtype, session.platform, session.mesh)
    compiled = jax.jit(lambda params: gradients(params, batch, jnp.float32(1), step_cfg)[:2])

    def step() -> float:
        held["state"], metrics = machine.train_step(0, held["state"], batch)
        return float(metrics["loss"])

    def pull() -> float:
        return float(jax.block_until_ready(compiled(held["state"].params))[0])

    return step, pull


MATMUL = np.ones((2048, 256), np.float32), np.ones((256, 1024), np.float32)
"""The dense product whose rate counts as the machine's limit."""


def worker(pipe, side: str, cfg: RunConfig) -> None:
    """One contender: does what the pipe names ("step", "pull", "matmul") and answers (seconds, processor seconds, loss)."""
    if side == "ours":
        x, y = (jnp.asarray(m, cfg.train.compute_dtype) for m in MATMUL)
        product = jax.jit(jnp.dot)
        step, pull = ours(cfg)
        actions = {"step": step, "pull": pull, "matmul": lambda: jax.block_until_ready(product(x, y))}
    else:
        from bench import torch_peer
        experts, precision = side.split()[1:]
        step, pull = torch_peer.programs(cfg.model, random_batch(cfg), experts, precision)
        actions = {"step": step, "pull": pull, "matmul": torch_peer.matmul(*MATMUL, cfg.train.compute_dtype)}
    while (name := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        value = actions[name]()
        answer = time.perf_counter() - wall, time.process_time() - cpu, value if name != "matmul" else None
        pipe.send(answer)


def fastest(pipes: dict, action: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Best (seconds, processor seconds) of each contender, in turns; the first round is not counted."""
    best = dict.fromkeys(pipes, (float("inf"), float("inf")))
    for turn in range(rounds + 1):
        for side, pipe in pipes.items():
            pipe.send(action)
            seconds, busy, _ = pipe.recv()
            if turn:
                best[side] = min(best[side][0], seconds), min(best[side][1], busy)
    return best


def compare(shape: str, dtype: str, rounds: int) -> dict:
    """One row: tokens per second of each contender and what they come to."""
    cfg = config(shape, dtype)
    precisions = ("float32",) if dtype == "float32" else ("autocast", "bfloat16")
    sides = ["ours", *(f"torch {experts} {precision}" for precision in precisions for experts in EXPERTS)]
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for side in sides:
        pipes[side], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=worker, args=(theirs, side, cfg), daemon=True))
        processes[-1].start()
    steps, pulls, products = (fastest(pipes, action, n) for action, n in (("step", rounds), ("pull", rounds), ("matmul", 100)))
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(None)
        process.join()
    tokens = cfg.train.batch_size * cfg.train.seq_len
    per_token = train_flops_per_token(cfg.model, param_specs(cfg.model), cfg.train.seq_len)
    limit = 2 * MATMUL[0].size * MATMUL[1].shape[1] / products["ours"][0]
    rows = {side: {"tokens_per_s": round(tokens / steps[side][0]), "step_ms": round(1e3 * steps[side][0], 1),
                   "step_cpu_ms": round(1e3 * steps[side][1], 1), "forward_backward_ms": round(1e3 * pulls[side][0], 1)}
            for side in sides}
    peer = max(sides[1:], key=lambda side: rows[side]["tokens_per_s"])
    return {"shape": shape, "dtype": dtype, "tokens": tokens, "flops_per_token": per_token, "sides": rows, "best_peer": peer,
            "ratio": round(rows["ours"]["tokens_per_s"] / rows[peer]["tokens_per_s"], 2),
            "matmul_gflops": round(limit / 1e9), "share_of_limit": round(per_token * tokens / pulls["ours"][0] / limit, 3)}


def first_step() -> dict[str, float]:
    """Seconds from the command to the first line of a step of the tiny preset."""
    with tempfile.TemporaryDirectory() as folder:
        def once(name: str) -> float:
            command = [sys.executable, "launch.py", "train", "--preset", "tiny", "--run", f"{folder}/{name}"]
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env=os.environ | {"HOME": folder})
            for line in process.stdout:
                if re.search(r"step +1\b", line):
                    break
            seconds = time.perf_counter() - start
            process.terminate()
            process.communicate()
            return round(seconds, 1)

        return {"empty_cache_s": once("first"), "filled_cache_s": once("second")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            rows.append(row := compare(shape, dtype, args.rounds))
            print(f"{shape}, {dtype}: {row['ratio']} x {row['best_peer']}; forward and backward at "
                  f"{row['share_of_limit']:.0%} of {row['matmul_gflops']} GFLOP/s", flush=True)
            for name, side in row["sides"].items():
                print(f"  {name:26} {side['tokens_per_s']:>7} tokens/s   step {side['step_ms']:>8.1f} ms   "
                      f"forward and backward {side['forward_backward_ms']:>8.1f} ms", flush=True)
    start = first_step()
    print(f"first step of the tiny preset after {start['empty_cache_s']} s, with a filled compilation cache after "
          f"{start['filled_cache_s']} s")
    if args.write:
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        print(f"wrote {measure.write('train', [*rows, {'first_step': start, 'versions': versions}]).name}")


if __name__ == "__main__":
    main()
