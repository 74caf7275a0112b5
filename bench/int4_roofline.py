"""Bytes that one decode step must read, bf16 against INT4 experts: `python -m bench.int4_roofline [PRESET]`.

Decoding is bound by weight bandwidth, so the ratio of bytes bounds the speed-up. Experts hit per layer follow from
uniform routing: E * (1 - (1 - K/E)**tokens). Below it, measured points of one layer's experts: bits per weight in the
compiled program's argument buffers, and time, whole and at four bits; written to bench/results.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bench import measure
from configs.platforms import platform_of
from configs.presets import preset
from configs.schema import ModelConfig
from model import experts
from model.transformer import param_specs
from quant.resident import bits_per_weight, to_int4

TOKENS = (1, 4, 16, 64, 256)


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


def measured(model: ModelConfig, dtype: str) -> list[dict]:
    """One MoE layer's routed experts on this machine, eight experts for all of them: milliseconds and bits per weight of
    the argument buffers, whole and at four bits, for some numbers of tokens."""
    E, D, F, K = 8, model.hidden_size, model.moe_intermediate_size, 2
    keys = jax.random.split(jax.random.key(0), 4)
    packed = tuple(to_int4(jax.random.normal(key, shape), -2, 32) for key, shape in zip(keys, ((E, D, 2 * F), (E, F, D))))
    held = {"whole": tuple(w.astype(dtype) for w in packed), "int4": packed}
    weights, rows = E * 3 * D * F, []
    for tokens in TOKENS[:4]:
        x = jax.random.normal(keys[2], (tokens, D), dtype)
        chosen = jax.lax.top_k(jax.random.normal(keys[3], (tokens, E)), K)[1]
        gates = jnp.full((tokens, K), 1 / K)
        step = jax.jit(lambda x, w, chosen=chosen, gates=gates: experts.apply(x, chosen, gates, w, platform_of(jax.devices()[0])))
        compiled = {name: step.lower(x, w).compile() for name, w in held.items()}
        times = measure.in_turns({name: partial(compiled[name], x, w) for name, w in held.items()}, rounds=9)
        bits = {name: (c.memory_analysis().argument_size_in_bytes - x.nbytes) * 8 / weights for name, c in compiled.items()}
        hit = len(set(chosen.ravel().tolist()))
        for name in held:
            ideal = bits[name] * weights * hit / E / 8
            rows.append({"tokens": tokens, "experts_hit": hit, "held": name, "dtype": dtype, "bits_per_weight": bits[name],
                         "bytes_to_read": ideal, "GB_per_s": round(ideal / times[name]["wall_ms"] / 1e6, 2), **times[name]})
    return rows


def main(name: str) -> None:
    model, console = preset(name).model, Console()
    console.print(f"{name}: weights read per decode step, lower bound")
    console.print(roofline(model))
    rows = [row for dtype in ("bfloat16", "float32") for row in measured(model, dtype)]
    table = Table("tokens", "experts hit", "dtype", "bits whole", "bits INT4", "ms whole", "ms INT4", "bytes ratio", "time ratio")
    for whole, packed in zip(rows[::2], rows[1::2]):
        bits, ms = ([f"{row[key]:.4g}" for row in (whole, packed)] for key in ("bits_per_weight", "wall_ms"))
        table.add_row(str(whole["tokens"]), f"{whole['experts_hit']} of 8", whole["dtype"], *bits, *ms,
                      f"{whole['bytes_to_read'] / packed['bytes_to_read']:.2f}",
                      f"{whole['wall_ms'] / packed['wall_ms']:.2f}")
    console.print(f"measured on {jax.default_backend()}, jax {jax.__version__}: one layer's experts, 8 of them, 2 per token")
    console.print(table)
    console.print(f"wrote {measure.write(f'int4_roofline-{name}', rows).name}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "kimi_k2")
