"""Log-probabilities under exactly the exported weights, layer by layer: no more of the masters is in memory than one layer,
and of its experts only their codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.param_spec import Specs
from configs.schema import ModelConfig
from model.call import Call
from model.decode.served_params import SERVED, serve
from model.transformer import Transformer, bind
from quant.coverage import group_axis
from quant.importer import Imported
from quant.resident import Int4Weight, to_int4
from quant.served import Serving
from quant.source import WeightSource

HEAD_COLUMNS = 1 << 14
"""Of the vocabulary at a time."""


def logits(
    weights: WeightSource, specs: Specs, model: ModelConfig, serving: Serving, rows: np.ndarray, platform: str
) -> np.ndarray:
    """[N, S] tokens -> [N, S, V] float32 logits of masters as `serving` sees them (amount 1), computed in float32."""
    # Hopper's kernels take no float32, and training is told so; here nothing else is wanted.
    run = partial(_run, model=model, platform="gpu" if platform == "hopper" else platform)
    stacked = [path for path, spec in specs.items() if spec.axes[0] == "layers"]
    x = _serve_one(weights.read("embed", ())[rows], "embed", specs, serving)
    for number in range(model.first_k_dense_replace):
        mine = {path: weights.read(path, ()) for path, spec in specs.items() if spec.layers == (number,) and path not in stacked}
        x = run(serve(mine, {path: specs[path] for path in mine}, serving, 1.0, "float32"), x, part=f"dense.{number}")
    for number in range(model.num_moe_layers):
        x = run({path: _layer(weights, path, specs, serving, number) for path in stacked}, x, part="moe")
    x = run({"final_norm": _serve_one(weights.read("final_norm", ()), "final_norm", specs, serving)}, x, part="final_norm")
    head = weights.read("head", ())
    columns = range(0, head.shape[1], HEAD_COLUMNS)
    return np.concatenate(
        [
            np.asarray(run({"head": _serve_one(head[:, at : at + HEAD_COLUMNS], "head", specs, serving)}, x, part="head"))
            for at in columns
        ],
        axis=-1,
    )


def _serve_one(w: np.ndarray, path: str, specs: Specs, serving: Serving) -> Array:
    return serve({path: jnp.asarray(w)}, {path: specs[path]}, serving, 1.0, "float32")[path]


def _layer(weights: WeightSource, path: str, specs: Specs, serving: Serving, number: int) -> Array | Int4Weight:
    """[1, ...]: one layer of a stacked array as it is served, or as it lies in the files of an INT4 directory."""
    if isinstance(weights, Imported) and path in weights.packed:
        return weights.int4_layer(path, number)
    spec = specs[path]
    if not (spec.on_grid and serving.grid != "none"):
        return _serve_one(weights.read(path, (number,))[None], path, specs, serving)
    axis = group_axis(spec)
    experts = [to_int4(weights.read(path, (number, e)), axis, serving.group_size) for e in range(spec.shape[1])]
    codes, scales = (jnp.stack(parts)[None] for parts in zip(*((w.codes, w.scales) for w in experts)))
    return Int4Weight(codes, scales, axis, serving.group_size)


@partial(jax.jit, static_argnames=("model", "platform", "part"))
def _run(params, x: Float[Array, "N S D"], *, model: ModelConfig, platform: str, part: str) -> Array:
    """One part of the network on the residual stream; `params` has the arrays of that part."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    call = Call(positions, jnp.ones(x.shape[:2], jnp.int32), jnp.float32(0), SERVED, "float32", platform)
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 in fewer bits unless told
        return _parts(model)[part.partition(".")[0]](bind(model, params, partly=True), part, x, call)


def _parts(model: ModelConfig) -> dict[str, Callable[[Transformer, str, Array, Call], Array]]:
    return {
        "dense": lambda net, part, x, call: net.dense[int(part.partition(".")[2])](x, call)[0],
        "moe": lambda net, _, x, call: jax.lax.scan(lambda x, layer: (layer(x, call)[0], None), x, net.moe)[0],
        "final_norm": lambda net, _, x, call: net.final_norm(x, call),
        "head": lambda net, _, x, call: net.logits(x, call),
    }
