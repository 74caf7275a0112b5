"""Where each (token, expert) pair goes: rows sorted by expert, every expert padded to whole blocks. No token is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatch:
    """A permutation with padding. N tokens, K choices each, M slots (a multiple of `block`).

    slot_of        [N, K] the slot of a token's k-th choice; M or more for pairs that nobody works on
    token_of       [M] the token of a slot, N where the slot is padding
    block_expert   [M/block] the expert of each block, ascending but for blocks of one row; E for the blocks of nobody
    platform       which program brings rows to their slots (configs/platforms.py)
    """

    slot_of: Int[Array, "N K"]
    token_of: Int[Array, "M"]
    block_expert: Int[Array, "M/b"]
    block: int = field(metadata={"static": True})
    platform: str = field(default="cpu", metadata={"static": True})

    @property
    def in_order(self) -> bool:
        """Whether pairs lie in their order, each in a block of its own, so that nothing need be looked up."""
        return self.block == 1


def plan(experts_NK: Int[Array, "N K"], num_experts: int, block: int, platform: str = "cpu") -> Dispatch:
    """Slots for the chosen experts; a pair with expert E has none. M is the worst case over all routings:
    sum_e ceil(n_e / block) blocks."""
    if block == 1:
        return _where_they_are(experts_NK, num_experts, platform)
    pairs, K = experts_NK.size, experts_NK.shape[1]
    num_blocks = (pairs + min(num_experts, pairs) * (block - 1)) // block
    expert_of = experts_NK.reshape(-1)
    order = jnp.argsort(expert_of, stable=True)
    counts = jnp.zeros(num_experts, jnp.int32).at[expert_of].add(1)
    blocks_of = -(-counts // block)
    first_slot = block * (jnp.cumsum(blocks_of) - blocks_of)
    sorted_experts, place = expert_of[order], jnp.arange(pairs)
    slots = (first_slot - jnp.cumsum(counts) + counts)[sorted_experts] + place
    slots = jnp.where(sorted_experts < num_experts, slots, num_blocks * block + place)
    return Dispatch(
        slot_of=jnp.zeros(pairs, jnp.int32).at[order].set(slots, unique_indices=True).reshape(-1, K),
        token_of=jnp.full(num_blocks * block, len(experts_NK), jnp.int32).at[slots].set(order // K, unique_indices=True),
        # Counted, not searched for: a search is a loop of gathers, which accelerators are slow at.
        block_expert=jnp.sum(jnp.cumsum(blocks_of) <= jnp.arange(num_blocks)[:, None], axis=1, dtype=jnp.int32),
        block=block,
        platform=platform,
    )


def _where_they_are(experts_NK: Int[Array, "N K"], num_experts: int, platform: str) -> Dispatch:
    """Every pair in a block of its own, in the order of the tokens: nothing is sorted or counted, which takes longer than a few
    rows' products."""
    place, works = jnp.arange(experts_NK.size).reshape(experts_NK.shape), experts_NK < num_experts
    token_of = jnp.where(works, jnp.arange(len(experts_NK))[:, None], len(experts_NK))
    slot_of = jnp.where(works, place, experts_NK.size + place)
    return Dispatch(slot_of, token_of.reshape(-1), experts_NK.reshape(-1).astype(jnp.int32), 1, platform)


def _works(to: Dispatch) -> Bool[Array, "N K"]:
    """Pairs that somebody works on."""
    return to.slot_of < len(to.token_of)


def _copy_to_slots(x_ND, to: Dispatch):
    if to.in_order:
        return jnp.where(_works(to)[..., None], x_ND[:, None], 0).reshape(-1, x_ND.shape[1])
    if to.platform == "hopper":
        from model.kernels import gather_gpu  # Pallas takes longer to import than a CPU has use for

        if gather_gpu.takes(x_ND, len(to.token_of)):
            return gather_gpu.rows(x_ND, to.token_of)
    return jnp.take(x_ND, to.token_of, axis=0, mode="fill", fill_value=0)


def _sum_from_slots(y_MD, to: Dispatch):
    if to.in_order:
        found = jnp.where(_works(to)[..., None], y_MD.reshape(*to.slot_of.shape, -1), 0)
    else:
        found = jnp.take(y_MD, to.slot_of, axis=0, mode="fill", fill_value=0)
    return jnp.sum(found.astype(jnp.float32), axis=1).astype(y_MD.dtype)


@jax.custom_vjp
def to_slots(x_ND: Float[Array, "N D"], to: Dispatch) -> Float[Array, "M D"]:
    """Copy every token to its K slots; padding slots are zero."""
    return _copy_to_slots(x_ND, to)


@jax.custom_vjp
def from_slots(y_MD: Float[Array, "M D"], to: Dispatch) -> Float[Array, "N D"]:
    """Sum every token's K slots; a slot of M or more is empty. The adjoint of `to_slots`; both gradients are gathers,
    never a scatter-add."""
    return _sum_from_slots(y_MD, to)


to_slots.defvjp(lambda x, to: (_copy_to_slots(x, to), to), lambda to, g: (_sum_from_slots(g, to), None))
from_slots.defvjp(lambda y, to: (_sum_from_slots(y, to), to), lambda to, g: (_copy_to_slots(g, to), None))


def gates_to_slots(gates_NK: Float[Array, "N K"], to: Dispatch) -> Float[Array, "M"]:
    """Gate weight of every slot, 0 for padding."""
    if to.in_order:
        return jnp.where(_works(to), gates_NK, 0).reshape(-1)
    return jnp.zeros(len(to.token_of), gates_NK.dtype).at[to.slot_of].set(gates_NK, unique_indices=True)
