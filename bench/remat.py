"""Peak temporary memory of loss and gradients under every remat policy, from the compiled program.

    python -m bench.remat [--preset laptop] [--rows 1] [--positions 4096] [--topology v5p:2x2x1]

Nothing runs: the program is compiled for this machine's device, or for one chip of a machine that need not be there
(`launch.py plan` says what that needs), and its memory analysis is printed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from bench import measure
from configs.platforms import platform_of
from configs.presets import preset
from configs.schema import ConfigError, ModelConfig
from model import cross_entropy
from model.call import Call
from model.remat import POLICIES
from model.transformer import bind, param_specs
from quant.served import Serving
from train.compat import compile_for_devices
from train.plan.topology import topology


def compiled_memory(cfg: ModelConfig, rows: int, positions: int, policy: str, device: Any):
    """memory_analysis of value and gradients of the mean loss; bfloat16 activations, experts on the grid."""

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def loss(params, tokens, targets, at, segments):
        call = Call(at, segments, jnp.float32(1), Serving(grid="int4"), "bfloat16", platform_of(device), policy)
        network = bind(cfg, params)
        hidden, _, _ = network(tokens, call)
        nll, _ = cross_entropy.chunked(hidden.reshape(-1, cfg.hidden_size), call.exact_weight(network.head), targets.reshape(-1))
        return jnp.mean(nll)

    params = {path: array(spec.shape, jnp.float32) for path, spec in param_specs(cfg).items()}
    ints = [array((rows, positions), jnp.int32)] * 4
    with jax.default_device(device), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params, *ints)
        compiled = lowered.compile() if device.platform == "cpu" else compile_for_devices(lowered, Path(folder), [device])
    return compiled.memory_analysis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--topology", default="")
    args = parser.parse_args()
    if args.rows < 1 or args.positions < 1:
        parser.error(f"--rows and --positions must be at least 1, not {args.rows} and {args.positions}")
    try:
        cfg, rows = preset(args.preset).model, []
        device = topology(args.topology).devices()[0] if args.topology else jax.devices()[0]
    except ConfigError as error:
        parser.error(str(error))
    print(f"{args.preset}, {args.rows} x {args.positions} tokens, one {device.device_kind}: temporary memory in MB")
    for policy in POLICIES:
        used = compiled_memory(cfg, args.rows, args.positions, policy, device)
        rows.append(
            vars(args)
            | {
                "policy": policy,
                "temp_mb": round(used.temp_size_in_bytes / 1e6, 1),
                "host_temp_mb": round(used.host_temp_size_in_bytes / 1e6, 1),
            }
        )
        print(f"{policy:8} {rows[-1]['temp_mb']:10.1f}   on the host {rows[-1]['host_temp_mb']:.1f}", flush=True)
    chip = args.topology.partition(":")[0].partition("-")[0]
    question = ("preset", "rows", "positions", "topology", "policy")
    print(f"wrote {measure.write('-'.join(filter(None, ('remat', chip))), rows, question).name}")


if __name__ == "__main__":
    main()
