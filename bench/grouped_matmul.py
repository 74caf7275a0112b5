"""Every grouped matmul of this platform against one dense product of equal useful FLOPs: forward, gradient of the rows,
gradient of the weights, on balanced and skewed loads.

    python -m bench.grouped_matmul

It runs on the device that is there; on a GPU the dense product is cuBLAS and Moonlight's and K2's shapes are measured too.
The dense product multiplies tokens*K rows by one matrix; padding to whole blocks is counted against the grouped form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp

from bench import measure
from configs.platforms import platform_of
from model import dispatch
from model.grouped_matmul import IMPLEMENTATIONS, block_rows, implementation

SMALL = {  # tokens, D, F (gate and up together), E, K
    "tiny gate_up": (8192, 128, 256, 16, 4),
    "tiny down": (8192, 128, 128, 16, 4),
    "laptop gate_up": (8192, 256, 256, 32, 4),
    "64 experts": (2048, 256, 512, 64, 8),
}
LARGE = {  # K2: the 48 experts of one device of eight, with the pairs that eight times 8,192 tokens send it
    "Moonlight gate_up": (16384, 2048, 2816, 64, 6),
    "Moonlight down": (16384, 1408, 2048, 64, 6),
    "K2 gate_up": (8192, 7168, 4096, 48, 8),
    "K2 down": (8192, 2048, 7168, 48, 8),
}

ENTRIES = {"cpu": ("batched", "scanned"), "tpu": ("batched", "tpu"), "gpu": ("batched",), "hopper": ("batched", "hopper")}
"""What is measured on each platform: all entries that run there, without the reference, which is E times the work, and on
accelerators without the one that goes turn by turn."""

CRASHES = "hopper", "batched", "weights"
"""Of LARGE shapes on a Hopper GPU: XLA's compiler (jax 0.11.2, 0.12.0.1) ends the process with a segmentation fault."""


def choose(load: str, tokens: int, E: int, K: int, key: jax.Array) -> jax.Array:
    """[tokens, K] distinct experts: at random, or with a quarter of the experts drawn six times as often as the others."""
    share = jnp.where(jnp.arange(E) < E // 4, 6.0 if load == "skewed" else 1.0, 1.0)
    return jax.lax.top_k(jnp.log(share) + jax.random.gumbel(key, (tokens, E)), K)[1]


@cache
def products(name: str) -> dict[str, Callable]:
    """The three products of an entry, of (x, w, g, block_expert); both loads run the same programs."""
    entry = IMPLEMENTATIONS[name]
    return {
        "forward": jax.jit(lambda x, w, g, owner: entry.rows(x, w, owner, False)),
        "rows": jax.jit(lambda x, w, g, owner: entry.rows(g, w, owner, True)),
        "weights": jax.jit(lambda x, w, g, owner: entry.weights(x, g, owner, len(w), w.dtype)),
    }


DENSE = {
    "forward": jax.jit(lambda x, w, g: x @ w),
    "rows": jax.jit(lambda x, w, g: g @ w.T),
    "weights": jax.jit(lambda x, w, g: x.T @ g),
}


def row(shape: str, sizes: tuple[int, ...], dtype, load: str, platform: str) -> dict:
    tokens, D, F, E, K = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    experts = choose(load, tokens, E, K, keys[0])
    to = jax.jit(dispatch.plan, static_argnums=(1, 2))(experts, E, block_rows(tokens * K, E, platform, trained=True))
    w = jax.random.normal(keys[1], (E, D, F), dtype)
    x = jax.random.normal(keys[2], (len(to.token_of), D), dtype)
    g = jax.random.normal(keys[3], (len(to.token_of), F), dtype)
    dense = x[: tokens * K], w[0], g[: tokens * K]
    flops, times, ratio = 2 * tokens * K * D * F, {}, {}
    for part in DENSE:
        calls = {"dense": lambda part=part: DENSE[part](*dense)}
        for name in ENTRIES[platform]:
            if shape in LARGE and (platform, name, part) == CRASHES:
                continue
            call = partial(products(name)[part], x, w, g, to.block_expert)
            if fits(call):
                calls[name] = call
        times[part] = measure.in_turns(calls)
        for name, entry in times[part].items():
            entry["TF/s"] = round(flops / entry["wall_ms"] / 1e9, 3)
            if name != "dense":
                ratio[f"{name} {part}"] = round(entry["wall_ms"] / times[part]["dense"]["wall_ms"], 2)
    return {
        "shape": shape,
        "tokens": tokens,
        "D": D,
        "F": F,
        "E": E,
        "K": K,
        "dtype": jnp.dtype(dtype).name,
        "load": load,
        "block": to.block,
        "padding": round(len(to.token_of) / (tokens * K) - 1, 3),
        "ratio": ratio,
        "times": times,
    }


def fits(call: Callable) -> bool:
    """Whether the device has the memory: `batched` gathers the weights of every block."""
    try:
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def main() -> None:
    platform, rows = platform_of(jax.devices()[0]), []
    shapes = SMALL if platform == "cpu" else SMALL | LARGE
    for shape, sizes in shapes.items():
        for dtype in (jnp.float32, jnp.bfloat16) if platform == "cpu" else (jnp.bfloat16,):
            for load in ("balanced", "skewed"):
                rows.append(row(shape, sizes, dtype, load, platform))
                rate = {part: entries["dense"]["TF/s"] for part, entries in rows[-1]["times"].items()}
                print(
                    f"{shape:17} {rows[-1]['dtype']:8} {load:8} time over dense: {rows[-1]['ratio']}; dense TF/s: {rate}",
                    flush=True,
                )
                path = measure.write("grouped_matmul", rows)  # after every row: what is interrupted has its answers so far
    print(f"{platform} uses {implementation(platform)!r}; wrote {path.name}")


if __name__ == "__main__":
    measure.parser(__doc__).parse_args()
    main()
