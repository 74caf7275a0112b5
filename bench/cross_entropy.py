"""Tiled cross-entropy, and the loss that forms its gradients in the forward pass, against the form that holds all logits: time,
and temporary memory of the compiled programs.

    python -m bench.cross_entropy

On the device that is there; an accelerator gets the family's widths. Ratios are of CPU time on a CPU, of the clock's elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench import measure
from model.cross_entropy import IMPLEMENTATIONS, TILE
from model.token_loss import with_gradients

SMALL = {"tiny": (8192, 128, 320), "one_gpu": (2048, 512, 65536), "K2 vocabulary": (2048, 128, 163840)}
LARGE = {"Moonlight": (8192, 2048, 163840), "K2": (8192, 7168, 163840)}
"""Tokens, width, vocabulary."""


def row(name: str, sizes: tuple[int, int, int], dtype, clock: str) -> dict:
    N, D, V = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (N, D), dtype), jax.random.normal(keys[1], (D, V)) * 0.1
    targets = jax.random.randint(keys[2], (N,), 0, V)
    losses = {kind: lambda h, w, of=of: jnp.mean(of(h, w, targets, TILE)[0]) for kind, of in IMPLEMENTATIONS.items()}
    losses["forward"] = lambda h, w: with_gradients(h, w, targets, jnp.full(N, 1 / N), jnp.float32(1), jnp.float32(0))[0]
    runs, memory = {}, {}
    for kind, loss in losses.items():
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        runs[kind] = lambda compiled=compiled: compiled(hidden, head)
        memory[kind] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
    times = measure.in_turns(runs, rounds=3)
    return {
        "shape": name,
        "tokens": N,
        "D": D,
        "V": V,
        "dtype": jnp.dtype(dtype).name,
        "times": times,
        "temp_mb": memory,
        "ratio": round(times["tiled"][clock] / times["reference"][clock], 2),
        "forward_ratio": round(times["forward"][clock] / times["reference"][clock], 2),
    }


def main() -> None:
    on_cpu, rows = jax.default_backend() == "cpu", []
    for name, sizes in (SMALL if on_cpu else LARGE).items():
        for dtype in (jnp.float32, jnp.bfloat16) if on_cpu else (jnp.bfloat16,):
            rows.append(row(name, sizes, dtype, "cpu_ms" if on_cpu else "wall_ms"))
            print(
                f"{name:14} {rows[-1]['dtype']:8} time over reference: tiled {rows[-1]['ratio']}, forward "
                f"{rows[-1]['forward_ratio']}, "
                f"temporary MB {rows[-1]['temp_mb']}",
                flush=True,
            )
    print(f"wrote {measure.write('cross_entropy', rows).name}")


if __name__ == "__main__":
    measure.parser(__doc__).parse_args()
    main()
