"""Tiled cross-entropy against the form that holds all logits: time, and temporary memory of the compiled programs.

    python -m bench.cross_entropy
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench import measure
from model.cross_entropy import IMPLEMENTATIONS, TILE

SHAPES = {"tiny": (8192, 128, 320), "one_gpu": (2048, 512, 65536), "K2 vocabulary": (2048, 128, 163840)}
"""Tokens, width, vocabulary."""


def row(name: str, dtype) -> dict:
    N, D, V = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (N, D), dtype), jax.random.normal(keys[1], (D, V)) * 0.1
    targets = jax.random.randint(keys[2], (N,), 0, V)
    runs, memory = {}, {}
    for kind, entropy in IMPLEMENTATIONS.items():
        def loss(h, w, entropy=entropy):
            return jnp.mean(entropy(h, w, targets, TILE)[0])
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        runs[kind] = lambda compiled=compiled: compiled(hidden, head)
        memory[kind] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
    times = measure.in_turns(runs, rounds=3)
    return {"shape": name, "tokens": N, "D": D, "V": V, "dtype": jnp.dtype(dtype).name, "times": times,
            "temp_mb": memory, "ratio": round(times["tiled"]["cpu_ms"] / times["reference"]["cpu_ms"], 2)}


def main() -> None:
    rows = []
    for name in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            rows.append(row(name, dtype))
            print(f"{name:14} {rows[-1]['dtype']:8} CPU time of tiled over reference {rows[-1]['ratio']}, "
                  f"temporary MB {rows[-1]['temp_mb']}", flush=True)
    print(f"wrote {measure.write('cross_entropy', rows).name}")


if __name__ == "__main__":
    main()
