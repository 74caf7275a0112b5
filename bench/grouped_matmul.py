"""Every grouped matmul against one dense product of equal useful FLOPs, forward and backward.

    python -m bench.grouped_matmul

The dense product multiplies tokens*K rows by one matrix; padding to whole blocks is counted against the grouped form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bench import measure
from model import dispatch
from model.grouped_matmul import IMPLEMENTATIONS, block_rows, grouped_matmul, implementation

SHAPES = {  # tokens, D, F (gate and up together), E, K
    "tiny gate_up": (8192, 128, 256, 16, 4), "tiny down": (8192, 128, 128, 16, 4),
    "laptop gate_up": (8192, 256, 256, 32, 4), "64 experts": (2048, 256, 512, 64, 8)}


def both(product):
    """(forward, gradients of both operands) of `product(x, w)`, jitted; the loss keeps the cotangent in x's dtype."""
    def pull(x, w, g):
        out, vjp = jax.vjp(product, x, w)
        return vjp(g)
    return jax.jit(product), jax.jit(pull)


def row(name: str, dtype) -> dict:
    tokens, D, F, E, K = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    experts = jax.lax.top_k(jax.random.normal(keys[0], (tokens, E)), K)[1]
    to = jax.jit(dispatch.plan, static_argnums=(1, 2))(experts, E, block_rows(tokens * K, E))
    w = jax.random.normal(keys[1], (E, D, F), dtype)
    x = jax.random.normal(keys[2], (len(to.token_of), D), dtype)
    g = jax.random.normal(keys[3], (len(to.token_of), F), dtype)
    # A batch axis as in the network's own dense layers: their gradients sum over two axes.
    dense, dense_pull = both(lambda x, w: x @ w)
    dense_x, dense_g = (a[:tokens * K].reshape(2, -1, a.shape[-1]) for a in (x, g))
    forward = {"dense": lambda: dense(dense_x, w[0])}
    backward = {"dense": lambda: dense_pull(dense_x, w[0], dense_g)}
    for kind in set(IMPLEMENTATIONS) - {"reference"}:
        f, pull = both(lambda x, w, kind=kind: grouped_matmul(x, w, to.block_expert, kind))
        forward[kind], backward[kind] = (lambda f=f: f(x, w)), (lambda pull=pull: pull(x, w, g))
    times = {"forward": measure.in_turns(forward), "backward": measure.in_turns(backward)}
    ratio = {f"{kind} {part}": round(t[kind]["cpu_ms"] / t["dense"]["cpu_ms"], 2)
             for part, t in times.items() for kind in sorted(t) if kind != "dense"}
    return {"shape": name, "tokens": tokens, "D": D, "F": F, "E": E, "K": K, "dtype": jnp.dtype(dtype).name,
            "block": to.block, "padding": round(len(to.token_of) / (tokens * K) - 1, 3), "ratio": ratio, "times": times}


def main() -> None:
    rows = []
    for name in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            rows.append(row(name, dtype))
            print(f"{name:15} {rows[-1]['dtype']:8} CPU time over dense: {rows[-1]['ratio']}", flush=True)
    path = measure.write("grouped_matmul", rows)
    print(f"this platform uses {implementation(jax.default_backend())!r}; wrote {path.name}")


if __name__ == "__main__":
    main()
