"""Every attention implementation, forward and backward, against the naive form.

    python -m bench.attention
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench import measure
from model.attention import CHUNK, IMPLEMENTATIONS, implementation

SHAPES = {"tiny": (32, 256, 4, 48, 32), "laptop": (8, 512, 4, 96, 64), "2048": (1, 2048, 4, 96, 64)}
"""Rows, positions, heads, query width, value width."""


def row(name: str, dtype) -> dict:
    B, S, H, d, v = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (B, S, H, d), dtype) for key in keys[:2])
    value, g = (jax.random.normal(key, (B, S, H, v), dtype) for key in keys[2:])
    segments, chunk = jnp.ones((B, S), jnp.int32), CHUNK[jax.default_backend()]
    at = jnp.arange(S)
    forward, backward = {}, {}
    for kind, attend in IMPLEMENTATIONS.items():
        f = jax.jit(lambda q, k, v, attend=attend: attend(q, k, v, segments, at, 0.1, chunk)[0])
        pull = jax.jit(lambda q, k, v, g, f=f: jax.vjp(f, q, k, v)[1](g))
        forward[kind], backward[kind] = (lambda f=f: f(q, k, value)), (lambda pull=pull: pull(q, k, value, g))
    times = {"forward": measure.in_turns(forward), "backward": measure.in_turns(backward)}
    ratio = {part: round(t["chunked"]["cpu_ms"] / t["reference"]["cpu_ms"], 2) for part, t in times.items()}
    return {"shape": name, "B": B, "S": S, "H": H, "dtype": jnp.dtype(dtype).name, "chunk": chunk,
            "chosen": implementation(jax.default_backend(), S), "chunked over reference": ratio, "times": times}


def main() -> None:
    rows = []
    for name in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            rows.append(row(name, dtype))
            print(f"{name:8} {rows[-1]['dtype']:8} CPU time of chunked over reference: "
                  f"{rows[-1]['chunked over reference']}", flush=True)
    print(f"wrote {measure.write('attention', rows).name}")


if __name__ == "__main__":
    main()
