"""Bytes that one decode step must read, bf16 against INT4 experts: `python -m bench.int4_roofline [PRESET]`.

Decoding is bound by weight bandwidth, so the ratio of bytes bounds the speed-up. Experts hit per layer follow from
uniform routing: E * (1 - (1 - K/E)**tokens). The last line is measured: bits per expert weight in a compiled
program's argument buffers, and in bf16 for comparison.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from configs.presets import preset
from configs.schema import ModelConfig
from model.transformer import param_specs
from quant.resident import Int4Weight, bits_per_weight, int4_rows

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


def measured_bits(model: ModelConfig, group: int = 32) -> tuple[float, float]:
    """Bits per weight of one layer's gate and up projections in device memory, (INT4, bf16), from compiled programs.

    Eight experts stand for all: the ratio does not depend on their number.
    """
    shape = (8, model.hidden_size, 2 * model.moe_intermediate_size)
    scales = (8, model.hidden_size // group, 2 * model.moe_intermediate_size)
    packed = Int4Weight(jax.ShapeDtypeStruct(shape, jnp.int4), jax.ShapeDtypeStruct(scales, jnp.bfloat16), -2, group)
    dense = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    x, experts = jax.ShapeDtypeStruct((8, model.hidden_size), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    other = x.size * 2 + 4

    def bits(function, weight) -> float:
        used = jax.jit(function).lower(x, weight, experts).compile().memory_analysis().argument_size_in_bytes
        return (used - other) * 8 / dense.size

    return bits(int4_rows, packed), bits(lambda x, w, e: jnp.einsum("nd,ndf->nf", x[:1], w[e]), dense)


def main(name: str) -> None:
    model, console = preset(name).model, Console()
    console.print(f"{name}: weights read per decode step, lower bound")
    console.print(roofline(model))
    packed, dense = measured_bits(model)
    console.print(f"measured on {jax.default_backend()}, jax {jax.__version__}: {packed:.3f} bits per expert weight "
                  f"resident, {dense:.3f} as bf16, ratio {dense / packed:.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "kimi_k2")
