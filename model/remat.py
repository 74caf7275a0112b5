"""What the backward pass recomputes instead of keeping. `python -m bench.remat` prints the peak memory of each policy."""

from __future__ import annotations

from collections.abc import Callable

import jax

NAMES = ("kv_latent", "attention_out", "attention_lse", "routing")
"""Kept by the "names" policy besides a layer's input: cheap to hold, dear to recompute. With output and log-sum-exp
kept, the backward pass rebuilds queries, keys and values but not the attention itself; with the chosen experts kept,
it neither scores nor sorts again. Norms, up-projections from latents, gathers and SwiGLU are recomputed."""

HIDDEN = "hidden"
"""Kept by the "hidden" policy besides: the gate and up that experts and feed-forward blocks give, before SwiGLU. It is the
largest product that "names" does twice, and the rows of its input would be brought to the experts twice too. Of experts
that tokens reach in rounds (model/transport/rounds.py) it keeps nothing: their backward pass repeats the rounds."""

POLICIES = ("none", "layer", "names", "hidden", "offload")


def wrap(layer: Callable, policy: str) -> Callable:
    """`layer(x, call)` under a policy of POLICIES.

    none: everything is kept. layer: only the layer's input is. names: the input and NAMES. hidden: those and HIDDEN.
    offload: as names, with NAMES in the host's memory between the passes.
    """

    def run(layer, x, call):
        return layer(x, call)

    keep = jax.checkpoint_policies
    if policy in ("names", "hidden"):
        kept = NAMES if policy == "names" else (*NAMES, HIDDEN)
        run = jax.checkpoint(run, policy=keep.save_only_these_names(*kept))
    elif policy == "offload":
        run = jax.checkpoint(
            run,
            policy=keep.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=list(NAMES),
                offload_src="device",
                offload_dst="pinned_host",
            ),
        )
    elif policy == "layer":
        run = jax.checkpoint(run)
    elif policy != "none":
        raise ValueError(f"there is no remat policy {policy!r}; choose one of {', '.join(POLICIES)}")
    return lambda x, call: run(layer, x, call)
