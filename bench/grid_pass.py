"""The INT4 grid of a layer's experts, as every forward pass takes it, against a cast to bfloat16: `python -m bench.grid_pass`.

The cast reads and writes what the grid must read and write, so it is the limit. Rates count masters read and bfloat16 values
written once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from bench import measure
from configs.platforms import platform_of
from quant import grid

SHAPES = {"Moonlight gate_up": ((64, 2048, 2, 1408), -3), "Moonlight down": ((64, 1408, 2048), -2)}
"""Arrays, and the axis of their groups; on a CPU two experts of each."""


def programs(platform: str, axis: int) -> dict:
    """Name to jitted function of the masters."""
    found = {
        "cast": jax.jit(lambda w: w.astype(jnp.bfloat16) * jnp.bfloat16(1)),
        "reference": jax.jit(lambda w: grid.on_grid(w, axis, 32).astype(jnp.bfloat16)),
    }
    if platform == "hopper":
        from quant import grid_gpu

        found["hopper"] = jax.jit(lambda w: grid_gpu.on_grid(w, axis, 32))
    return found


def main() -> None:
    platform, rows = platform_of(jax.devices()[0]), []
    clock = "cpu_ms" if platform == "cpu" else "wall_ms"
    for name, ((E, *shape), axis) in SHAPES.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            w = (0.02 * jax.random.normal(jax.random.key(0), (2 if platform == "cpu" else E, *shape))).astype(dtype)
            runs = programs(platform, axis)
            values = {kind: run(w) for kind, run in runs.items() if kind != "cast"}
            differ = {kind: int(jnp.sum(x != values["reference"])) for kind, x in values.items() if kind != "reference"}
            times = measure.in_turns({kind: partial(run, w) for kind, run in runs.items()})
            moved = w.size * (w.dtype.itemsize + 2)
            rate = {kind: round(moved / t[clock] / 1e6, 1) for kind, t in times.items()}
            rows.append(
                {"shape": name, "dtype": dtype.__name__, "weights": w.size, "GB/s": rate, "differ": differ, "times": times}
            )
            print(f"{name:18} {dtype.__name__:8} GB/s {rate}; other than the definition's: {differ}", flush=True)
    print(f"wrote {measure.write('grid_pass', rows).name}")


if __name__ == "__main__":
    measure.parser(__doc__).parse_args()
    main()
