"""One matrix product per expert over rows that are sorted by expert: the arithmetic of a mixture of experts.

Rows come in blocks of one expert each (model/dispatch.py pads every expert's rows to whole blocks), so there are no
ragged edges anywhere and no masks inside a kernel. Each implementation gives the three products of training: forward,
gradient of the rows, gradient of the weights. `lax.ragged_dot` is not among them: its gradients, and on CPU and GPU
its forward, compute every expert on every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class GroupedMatmul:
    """rows(x [M, D], w [E, D, F], block_expert [M/b]) -> [M, F]; weights(x [M, D], y [M, F], block_expert, E) -> [E, D, F]
    in float32. The gradient of the rows is `rows` with the weights transposed."""

    rows: Callable
    weights: Callable


def _reference_rows(x, w, block_expert):
    expert_of_row = jnp.repeat(block_expert, len(x) // len(block_expert))
    one_hot = jax.nn.one_hot(expert_of_row, len(w), dtype=x.dtype)
    return jnp.einsum("me,md,edf->mf", one_hot, x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _reference_weights(x, y, block_expert, num_experts):
    one_hot = jax.nn.one_hot(jnp.repeat(block_expert, len(x) // len(block_expert)), num_experts, dtype=x.dtype)
    return jnp.einsum("me,md,mf->edf", one_hot, x, y, preferred_element_type=jnp.float32)


def _blocked_rows(x, w, block_expert):
    blocks = x.reshape(len(block_expert), -1, x.shape[-1])
    return jnp.einsum("nbd,ndf->nbf", blocks, w[block_expert]).reshape(len(x), -1)


def _blocked_weights(x, y, block_expert, num_experts):
    n = len(block_expert)
    per_block = jnp.einsum("nbd,nbf->ndf", x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1]),
                           preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(per_block, block_expert, num_experts, indices_are_sorted=True)


IMPLEMENTATIONS = {
    "reference": GroupedMatmul(_reference_rows, _reference_weights),
    "blocked": GroupedMatmul(_blocked_rows, _blocked_weights),
}
"""reference: dense over all experts, the definition. blocked: one batched product over blocks with gathered weights."""


def implementation(platform: str) -> str:
    """Which entry the platform uses."""
    return "blocked"


def block_rows(platform: str, rows: int, num_experts: int) -> int:
    """Rows per block: small enough that padding each expert to whole blocks wastes little, large enough to fill the
    matrix units. On a CPU 32 to 64 is best (docs/performance.md)."""
    largest = 64 if platform == "cpu" else 128
    mean = max(rows // num_experts, 1)
    return max(8, min(largest, 1 << (mean // 2).bit_length()))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: Float[Array, "M D"], w: Float[Array, "E D F"], block_expert: Int[Array, "M/b"], name: str
                   ) -> Float[Array, "M F"]:
    """Block i of `x` times w[block_expert[i]]; `block_expert` ascends, `name` is a key of IMPLEMENTATIONS."""
    return IMPLEMENTATIONS[name].rows(x, w, block_expert)


def _forward(x, w, block_expert, name):
    return IMPLEMENTATIONS[name].rows(x, w, block_expert), (x, w, block_expert)


def _backward(name, saved, y):
    x, w, block_expert = saved
    dx = IMPLEMENTATIONS[name].rows(y, jnp.swapaxes(w, 1, 2), block_expert)
    dw = IMPLEMENTATIONS[name].weights(x, y, block_expert, len(w)).astype(w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)
