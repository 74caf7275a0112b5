"""How tokens reach experts that other devices hold, and come back. No token is dropped, whatever the routing.

One registry, one signature: `(x_ND, experts_NK, gates_NK, weights, shards, platform) -> [N, D]`, inside shard_map: N tokens
of this device, its E / expert experts. The result is each token's weighted sum over its K experts wherever they are.

    all_gather          every device of the expert axis gets all tokens of the group, works on those it has experts for,
                        and a reduce-scatter adds what all of them found ("ring of experts")
    all_to_all          every (token, expert) pair travels to its expert in a padded buffer, and back
    ragged_all_to_all   the same without moving the padding; TPU and GPU only
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from model import experts
from model.shards import Shards
from model.transport.exchange import all_to_all, ragged_all_to_all
from model.transport.gather import all_gather

IMPLEMENTATIONS: dict[str, Callable] = {
    "all_gather": all_gather,
    "all_to_all": all_to_all,
    "ragged_all_to_all": ragged_all_to_all,
}


def implementation(platform: str, ways: int, per_token: int) -> str:
    """The one that moves less: a gather receives N*D values from each other device, an all-to-all N*K/ways pairs. On the
    rings of a TPU torus, where an all-to-all crosses every link between two devices, the gather wins at any size."""
    return "all_gather" if platform == "tpu" or ways <= per_token else "all_to_all"


def routed(
    x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str, name: str
) -> Array:
    """The weighted sum of each token's experts, by the entry `name` or, for "auto", the one that suits the platform."""
    ways = shards.size("expert")
    if ways == 1:
        return experts.apply(x_ND, experts_NK, gates_NK, weights, platform)
    name = implementation(platform, ways, experts_NK.shape[1]) if name == "auto" else name
    return IMPLEMENTATIONS[name](x_ND, experts_NK, gates_NK, weights, shards, platform)
