"""Memory of a streaming export: `python -m bench.export_memory [GIGABYTES]` exports that many gigabytes of masters.

Masters are made block by block, as a checkpoint reader would deliver them; nothing but the exporter holds memory. The
directory goes to a temporary folder and is removed. Prints the peak resident memory above the process's start.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from configs.schema import ModelConfig, QuantConfig
from model.transformer import param_specs
from quant.export import export_model
from quant.verify import verify


class Generated:
    """A WeightSource of random masters that are never in memory together."""

    def __init__(self, specs):
        self.specs = specs

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        shape = self.specs[path].shape[len(index):]
        return np.random.default_rng([len(path), *index]).standard_normal(shape, np.float32) * np.float32(0.02)


class Peak:
    """Largest resident size while the block runs, above the one at its start, in bytes."""

    def __enter__(self):
        self.process, self.running = psutil.Process(), True
        self.start = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *error):
        self.running = False
        self.thread.join()
        self.bytes = self.most - self.start


def model_of(gigabytes: float) -> ModelConfig:
    """Moonlight's width and K2's vocabulary, with as many experts as fill the size."""
    small = ModelConfig(vocab_size=163840, hidden_size=1024, num_hidden_layers=5, num_attention_heads=16,
                        q_lora_rank=512, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                        intermediate_size=4096, moe_intermediate_size=1024, n_routed_experts=8, num_experts_per_tok=8)
    per_expert = 4 * 3 * 1024 * 1024 * small.num_moe_layers
    rest = 4 * sum(s.size for s in param_specs(small).values()) - 8 * per_expert
    experts = max(8, round((gigabytes * 1e9 - rest) / per_expert))
    return ModelConfig(**{**small.__dict__, "n_routed_experts": experts})


def main(gigabytes: float) -> None:
    model = model_of(gigabytes)
    specs = param_specs(model)
    masters = 4 * sum(s.size for s in specs.values())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        for what, run in (
            ("export", lambda: export_model(Generated(specs), specs, model, QuantConfig(), out)),
            ("verify", lambda: verify(out)),
        ):
            started = time.perf_counter()
            with Peak() as peak:
                run()
            print(f"{what}: {masters / 1e9:.1f} GB of masters, peak {peak.bytes / 1e9:.2f} GB above the start, "
                  f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 8.0)
