"""Bytes that one decode step must read, bf16 against INT4 experts: `python -m bench.int4_roofline [PRESET]`.

Decoding is bound by weight bandwidth, so the ratio of bytes bounds the speed-up. Experts hit per layer follow from
uniform routing: E * (1 - (1 - K/E)**tokens). Below it, measured points: a program that sends tokens through the experts of
some layers, one after another, each layer in memory of its own; bits per weight in its argument buffers, its time and the
bytes per second of weights that tokens chose, whole and at four bits; written to bench/results. Routing is left out: all
layers have the same, and the compiler knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bench import measure
from configs.platforms import platform_of
from configs.presets import preset
from configs.schema import ConfigError, ModelConfig
from model import experts
from model.transformer import param_specs
from quant.resident import bits_per_weight, to_int4

TOKENS = (1, 4, 16, 64, 256)

LAYERS, HELD = 8, 24 << 30
"""On accelerators: layers, of which even one token's four-bit experts together are more than a cache holds, and the bytes
that their bf16 weights may take: beside the four-bit ones they fit an H100."""


def active_weights(model: ModelConfig) -> tuple[int, int]:
    """(weights of one expert in all MoE layers, weights read for every token whatever it is)."""
    specs = param_specs(model)
    routed = sum(s.size for s in specs.values() if s.on_grid)
    everything = sum(s.size for path, s in specs.items() if path != "embed")
    return routed // model.n_routed_experts, everything - routed


def roofline(model: ModelConfig, group: int = 32) -> Table:
    """Gigabytes per step for several numbers of distinct tokens in the batch."""
    expert, always = active_weights(model)
    table = Table("tokens", "experts hit", "bf16 GB", "INT4 GB", "ratio")
    for tokens in TOKENS:
        share = 1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** tokens
        hit = model.n_routed_experts * share
        dense = 2 * (hit * expert + always) / 1e9
        packed = (bits_per_weight(group) / 8 * hit * expert + 2 * always) / 1e9
        table.add_row(str(tokens), f"{hit:.0f}", f"{dense:.4g}", f"{packed:.4g}", f"{dense / packed:.2f}")
    return table


def sizes(model: ModelConfig, platform: str) -> tuple[int, int, int]:
    """Layers, experts of each, experts per token: the model's own where they fit, on a CPU a few."""
    if platform == "cpu":
        return 1, 8, 2
    expert = 2 * 3 * model.hidden_size * model.moe_intermediate_size
    return LAYERS, min(model.n_routed_experts, HELD // (LAYERS * expert)), model.num_experts_per_tok


def program(chosen: jax.Array, gates: jax.Array, platform: str) -> Callable:
    """(x [tokens, D], weights of every layer) -> x behind all of them."""

    def through(x, layers):
        for weights in layers:
            x += experts.apply(x, chosen, gates, weights, platform)
        return x

    return jax.jit(through)


def measured(model: ModelConfig, dtype: str) -> list[dict]:
    """On this machine's device: milliseconds of the program and bits per weight of its argument buffers, whole and at four
    bits, for some numbers of tokens."""
    platform, D, F = platform_of(jax.devices()[0]), model.hidden_size, model.moe_intermediate_size
    L, E, K = sizes(model, platform)
    keys = jax.random.split(jax.random.key(0), 2 * L + 2)
    shapes = ((E, D, 2 * F), (E, F, D)) * L
    arrays = [to_int4(jax.random.normal(key, shape) / shape[1] ** 0.5, -2, 32) for key, shape in zip(keys, shapes)]
    packed = list(zip(arrays[::2], arrays[1::2]))
    held = {"whole": [tuple(w.astype(dtype) for w in layer) for layer in packed], "int4": packed}
    weights, rows = L * E * 3 * D * F, []
    for tokens in TOKENS[:4]:
        x = jax.random.normal(keys[-2], (tokens, D), dtype)
        chosen = jax.lax.top_k(jax.random.normal(keys[-1], (tokens, E)), K)[1]
        step = program(chosen, jnp.full((tokens, K), 1 / K), platform)
        compiled = {name: step.lower(x, layers).compile() for name, layers in held.items()}
        times = measure.in_turns({name: partial(compiled[name], x, layers) for name, layers in held.items()}, rounds=9)
        bits = {name: (c.memory_analysis().argument_size_in_bytes - x.nbytes) * 8 / weights for name, c in compiled.items()}
        hit = len(set(chosen.ravel().tolist()))
        for name in held:
            ideal = bits[name] * weights * hit / E / 8
            rows.append(
                {
                    "tokens": tokens,
                    "layers": L,
                    "experts": E,
                    "experts_per_token": K,
                    "experts_hit": hit,
                    "held": name,
                    "dtype": dtype,
                    "bits_per_weight": bits[name],
                    "bytes_to_read": ideal,
                    "GB_per_s": round(ideal / times[name]["wall_ms"] / 1e6, 2),
                    **times[name],
                }
            )
    return rows


def main(name: str) -> None:
    model, console = preset(name).model, Console()
    console.print(f"{name}: weights read per decode step, lower bound")
    console.print(roofline(model))
    dtypes = ("bfloat16", "float32") if jax.default_backend() == "cpu" else ("bfloat16",)
    rows = [row for dtype in dtypes for row in measured(model, dtype)]
    table = Table("tokens", "experts hit", "dtype", "bits", "ms", "GB/s", "bytes ratio", "time ratio")
    for whole, packed in zip(rows[::2], rows[1::2]):
        both = [f"{whole[key]:.4g} / {packed[key]:.4g}" for key in ("bits_per_weight", "wall_ms", "GB_per_s")]
        table.add_row(
            str(whole["tokens"]),
            f"{whole['experts_hit']} of {whole['experts']}",
            whole["dtype"],
            *both,
            f"{whole['bytes_to_read'] / packed['bytes_to_read']:.2f}",
            f"{whole['wall_ms'] / packed['wall_ms']:.2f}",
        )
    console.print(
        f"measured on {jax.default_backend()}, jax {jax.__version__}: one program through the experts of "
        f"{rows[0]['layers']} layer(s), {rows[0]['experts']} each, {rows[0]['experts_per_token']} per token, routing "
        f"known beforehand; whole / INT4"
    )
    console.print(table)
    console.print(f"wrote {measure.write(f'int4_roofline-{name}', rows).name}")


if __name__ == "__main__":
    arguments = measure.parser(__doc__)
    arguments.add_argument("preset", nargs="?", default="kimi_k2")
    try:
        main(arguments.parse_args().preset)
    except ConfigError as error:
        arguments.error(str(error))
