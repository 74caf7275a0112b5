"""Peak temporary memory of loss and gradients under every remat policy, from the compiled program.

    python -m bench.remat [--preset laptop] [--rows 1] [--positions 4096]

Nothing runs: the program is compiled for this machine's device and its memory analysis is printed.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from bench import measure
from configs.presets import preset
from configs.schema import ModelConfig
from model import cross_entropy
from model.call import Call
from model.remat import POLICIES
from model.transformer import bind, param_specs
from quant.served import Serving


def compiled_memory(cfg: ModelConfig, rows: int, positions: int, policy: str, platform: str):
    """memory_analysis of value and gradients of the mean loss; bfloat16 activations, experts on the grid."""
    def ints():
        return jax.ShapeDtypeStruct((rows, positions), jnp.int32)

    def loss(params, tokens, targets, at, segments):
        call = Call(at, segments, jnp.float32(1), Serving(grid="int4"), "bfloat16", platform, policy)
        network = bind(cfg, params)
        hidden, _, _ = network(tokens, call)
        nll, _ = cross_entropy.chunked(hidden.reshape(-1, cfg.hidden_size), call.exact_weight(network.head),
                                       targets.reshape(-1))
        return jnp.mean(nll)

    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in param_specs(cfg).items()}
    return jax.jit(jax.value_and_grad(loss)).lower(params, ints(), ints(), ints(), ints()).compile().memory_analysis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--positions", type=int, default=4096)
    args = parser.parse_args()
    cfg, rows = preset(args.preset).model, []
    print(f"{args.preset}, {args.rows} x {args.positions} tokens: temporary memory in MB")
    for policy in POLICIES:
        used = compiled_memory(cfg, args.rows, args.positions, policy, jax.default_backend())
        rows.append(vars(args) | {"policy": policy, "temp_mb": round(used.temp_size_in_bytes / 1e6, 1),
                                  "host_temp_mb": round(used.host_temp_size_in_bytes / 1e6, 1)})
        print(f"{policy:8} {rows[-1]['temp_mb']:10.1f}   on the host {rows[-1]['host_temp_mb']:.1f}", flush=True)
    print(f"wrote {measure.write('remat', rows).name}")


if __name__ == "__main__":
    main()
