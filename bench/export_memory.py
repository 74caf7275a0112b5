"""Memory of an export: `python -m bench.export_memory [GIGABYTES ...]` writes checkpoints with that many gigabytes of masters
and exports each by `launch.py export`, in processes of their own.

The masters are random, saved by the training loop's checkpoint code in a run directory with its config; everything lies in a
temporary folder and is removed. Prints the exporting process's peak resident memory, jax and all other libraries in it, above
an interpreter's that only prints `launch.py --help`, and writes bench/results/export_memory-*.json.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from bench import measure
from configs.presets import preset
from configs.schema import ModelConfig
from model.transformer import param_specs

LAUNCH = [sys.executable, str(Path(__file__).parents[1] / "launch.py")]


def peak_of(*arguments: str) -> tuple[int, float]:
    """Largest resident size of a verb, in bytes, and its seconds. Raises where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([*LAUNCH, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most = 0
    while process.poll() is None:
        try:
            most = max(most, psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    if process.wait():
        raise RuntimeError(process.stderr.read().decode()[-2000:])
    return most, time.perf_counter() - started


def write_run(path: Path, model: ModelConfig) -> None:
    """A run directory at step 1 whose masters are random numbers."""
    import jax

    from train.checkpoint import Checkpoints
    from train.run_dir import RunDir

    base = preset("tiny")
    run = RunDir(path)
    run.write_config(replace(base, model=model), {"compute_dtype": "float32"})
    rng = np.random.default_rng(0)
    params = {
        name: jax.device_put(rng.standard_normal(spec.shape, np.float32) * np.float32(0.02))
        for name, spec in param_specs(model).items()
    }
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(1, {"params": params})
    checkpoints.close()


def model_of(gigabytes: float) -> ModelConfig:
    """Moonlight's width and K2's vocabulary, with as many experts as fill the size."""
    small = ModelConfig(
        vocab_size=163840,
        hidden_size=1024,
        num_hidden_layers=5,
        num_attention_heads=16,
        q_lora_rank=512,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=4096,
        moe_intermediate_size=1024,
        n_routed_experts=8,
        num_experts_per_tok=8,
    )
    per_expert = 4 * 3 * 1024 * 1024 * small.num_moe_layers
    rest = 4 * sum(s.size for s in param_specs(small).values()) - 8 * per_expert
    experts = max(8, round((gigabytes * 1e9 - rest) / per_expert))
    return ModelConfig(**{**small.__dict__, "n_routed_experts": experts})


def main(sizes: list[float]) -> None:
    rows = []
    for gigabytes in sizes:
        model = model_of(gigabytes)
        masters = 4 * sum(s.size for s in param_specs(model).values())
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            writer = multiprocessing.get_context("spawn").Process(target=write_run, args=(run, model))
            writer.start()
            writer.join()
            start, _ = peak_of("--help")
            peak, seconds = peak_of("export", str(run))
        rows.append(
            {
                "masters_GB": round(masters / 1e9, 2),
                "start_GB": round(start / 1e9, 3),
                "peak_GB": round(peak / 1e9, 3),
                "above_start_GB": round((peak - start) / 1e9, 3),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
        measure.write("export_memory", rows, question=("masters_GB",))


if __name__ == "__main__":
    arguments = measure.parser(__doc__)
    arguments.add_argument("gigabytes", nargs="*", type=float, default=[2.0, 8.0], help="of masters")
    sizes = arguments.parse_args().gigabytes
    if min(sizes) <= 0:
        arguments.error(f"gigabytes of masters must be above 0, not {min(sizes):g}")
    main(sizes)
