"""Every attention that runs on this device, forward and backward, against the naive form and the matrix units' limit.

    python -m bench.attention

On a CPU the shapes are small and ratios are of CPU time; on an accelerator they are those of the family's layers, and
times are the clock's. The limit is one square product in the same run; useful FLOPs count the pairs of a query and a key
that see each other. On a Hopper GPU our three kernels are timed by themselves too, with the logits that they form again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench import measure
from configs.platforms import platform_of
from model.attention import CHUNK, IMPLEMENTATIONS, implementation
from model.kernels import attention_gpu
from model.kernels.attention_gpu import gradients, outputs
from model.kernels.intervals import Intervals

SHAPES = {
    "tiny": (32, 256, 4, 48, 32),
    "laptop": (8, 512, 4, 96, 64),
    "2048": (1, 2048, 4, 96, 64),
    "moonlight 4096": (2, 4096, 16, 192, 128),
    "K2 4096": (1, 4096, 64, 192, 128),
    "K2 32768": (1, 32768, 8, 192, 128),
}
"""Rows, positions, heads, query width, value width."""

ON_A_CPU = ("tiny", "laptop", "2048")
LOGITS = 8 << 30
"""Bytes of logits above which the naive form is left out."""


def entries(platform: str, q: jax.Array, v: jax.Array) -> list[str]:
    """Of the registry, those that run here on these operands."""
    (B, S, H, _), out = q.shape, []
    for kind in IMPLEMENTATIONS:
        if kind in ("hopper", "tpu") and kind != platform or kind == "hopper" and attention_gpu.refusal(q, v):
            continue
        if kind == "reference" and 4 * B * H * S * S > LOGITS:
            continue
        out.append(kind)
    return out


def hopper_kernels(q, k, v, g, segments, scale: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel, and TF/s of what it multiplies."""
    (B, S, H, d), width = q.shape, v.shape[-1]
    seen = Intervals.of(segments, jnp.arange(S), S, S)
    forward = jax.jit(lambda *x: outputs.forward(*x, seen, scale))
    out, lse, _ = forward(q, k, v)
    delta = jnp.einsum("BSHv,BSHv->BHS", g.astype(jnp.float32), out.astype(jnp.float32))
    of_queries = jax.jit(lambda *x: gradients.of_queries(*x, seen, scale))
    of_keys = jax.jit(lambda *x: gradients.of_keys(*x, seen, scale))
    saved = q, k, v, g, lse, delta
    times = measure.in_turns(
        {"forward": lambda: forward(q, k, v), "queries": lambda: of_queries(*saved), "keys": lambda: of_keys(*saved)}
    )
    columns = {"forward": d + width, "queries": 2 * d + width, "keys": 2 * d + 2 * width}
    return {name: t | {"TF/s": round(B * H * S * (S + 1) * columns[name] / t["wall_ms"] / 1e9, 1)} for name, t in times.items()}


def row(name: str, dtype, limit: float) -> dict:
    """`limit`: FLOPs per second of the square product."""
    platform, (B, S, H, d, v) = platform_of(jax.devices()[0]), SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (B, S, H, d), dtype) for key in keys[:2])
    value, g = (jax.random.normal(key, (B, S, H, v), dtype) for key in keys[2:])
    segments, chunk = jnp.ones((B, S), jnp.int32), CHUNK[platform]
    at = jnp.arange(S)
    forward, backward = {}, {}
    for kind in entries(platform, q, value):
        attend = IMPLEMENTATIONS[kind]
        f = jax.jit(lambda q, k, v, attend=attend: attend(q, k, v, segments, at, 0.1, chunk)[0])
        pull = jax.jit(lambda q, k, v, g, f=f: jax.vjp(f, q, k, v)[1](g))
        forward[kind], backward[kind] = (lambda f=f: f(q, k, value)), (lambda pull=pull: pull(q, k, value, g))
    times = {"forward": measure.in_turns(forward), "backward": measure.in_turns(backward)}
    clock = "cpu_ms" if platform == "cpu" else "wall_ms"
    useful = B * H * S * (S + 1) * (d + v)  # a query and a key: 2 (d + v) FLOPs forward; both passes of vjp: 3 times as many
    share = {
        f"{kind} {part}": round(flops / (t[kind]["wall_ms"] * 1e-3) / limit, 3)
        for (part, t), flops in zip(times.items(), (useful, 3 * useful))
        for kind in t
    }
    ratio = {
        f"{kind} {part}": round(t[kind][clock] / t["reference"][clock], 2)
        for part, t in times.items()
        for kind in t
        if kind != "reference" and "reference" in t
    }
    return {
        "shape": name,
        "B": B,
        "S": S,
        "H": H,
        "widths": [d, v],
        "dtype": jnp.dtype(dtype).name,
        "chunk": chunk,
        "chosen": implementation(platform, S),
        f"{clock} over reference": ratio,
        "share of the limit": share,
        "times": times,
        "kernels": hopper_kernels(q, k, value, g, segments, 0.1) if "hopper" in forward else None,
    }


def main() -> None:
    rows, on_cpu = [], jax.default_backend() == "cpu"
    for dtype in (jnp.float32, jnp.bfloat16) if on_cpu else (jnp.bfloat16,):
        limit = measure.product_flops(1024 if on_cpu else 8192, dtype)
        for name in SHAPES:
            if (name in ON_A_CPU) == on_cpu:
                rows.append(row(name, dtype, limit))
                ratio = next(value for key, value in rows[-1].items() if key.endswith("over reference"))
                print(
                    f"{name:15} {rows[-1]['dtype']:8} time over the naive form: {ratio}; share of the limit: "
                    f"{rows[-1]['share of the limit']}",
                    flush=True,
                )
                for kernel, t in (rows[-1]["kernels"] or {}).items():
                    print(f"{'':24} {kernel}: {t['wall_ms']} ms, {t['TF/s']} TF/s", flush=True)
    print(f"wrote {measure.write('attention', rows).name}")


if __name__ == "__main__":
    measure.parser(__doc__).parse_args()
    main()
