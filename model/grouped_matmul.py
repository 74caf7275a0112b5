"""One matrix product per expert over rows that are sorted by expert: the arithmetic of a mixture of experts.

Rows come in blocks of one expert each (model/dispatch.py pads every expert's rows to whole blocks), so there are no
ragged edges anywhere and no masks inside a kernel. Blocks of nobody, which a routing leaves over at the end, have the
expert E and rows of zeros. Blocks of a single row come in any order. Each implementation gives the three products of
training: forward, gradient of the rows, gradient of the weights. `lax.ragged_dot` is not among them: its gradients, and on
CPU and GPU its forward, compute every expert on every row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.in_stack import InStack
from model.project import outer_sum
from quant.resident import Int4Weight


@dataclass(frozen=True)
class GroupedMatmul:
    """rows(x [M, I], w, block_expert [M/b], transposed) -> [M, O], in x's dtype: row by its expert's weights, which are
    w [E, I, O], or w [E, O, I] where `transposed`. Of blocks of nobody: anything finite, zeros from zeros.
    weights(x [M, D], y [M, F], block_expert, E, dtype) -> [E, D, F]: sum of outer products over each expert's rows, in
    float32 until it is whole.
    """

    rows: Callable
    weights: Callable


def _blocks(x, block_expert):
    return x.reshape(len(block_expert), -1, x.shape[-1])


def _unpacked(w, dtype):
    """Weights as they are, or those of an Int4Weight: of the experts in use, after they were picked."""
    w = w.cut() if isinstance(w, InStack) else w
    return w.astype(dtype) if isinstance(w, Int4Weight) else w


def _to_pick_from(w, block_expert):
    """Arrays of experts, and which of them are meant."""
    return w.among_all(block_expert) if isinstance(w, InStack) else (w, block_expert)


def _reference_rows(x, w, block_expert, transposed):
    w = _unpacked(w, x.dtype)
    one_hot = jax.nn.one_hot(jnp.repeat(block_expert, len(x) // len(block_expert)), len(w), dtype=x.dtype)
    product = "me,mi,eoi->mo" if transposed else "me,mi,eio->mo"
    return jnp.einsum(product, one_hot, x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _reference_weights(x, y, block_expert, num_experts, dtype):
    one_hot = jax.nn.one_hot(jnp.repeat(block_expert, len(x) // len(block_expert)), num_experts, dtype=x.dtype)
    return jnp.einsum("me,md,mf->edf", one_hot, x, y, preferred_element_type=jnp.float32).astype(dtype)


def _batched_rows(x, w, block_expert, transposed):
    product = "nbi,noi->nbo" if transposed else "nbi,nio->nbo"
    w, block_expert = _to_pick_from(w, block_expert)
    out = jnp.einsum(product, _blocks(x, block_expert), _unpacked(w[block_expert], x.dtype), preferred_element_type=jnp.float32)
    return out.astype(x.dtype).reshape(len(x), -1)


def _batched_weights(x, y, block_expert, num_experts, dtype):
    per_block = outer_sum(_blocks(x, block_expert), _blocks(y, block_expert))
    return jax.ops.segment_sum(per_block, block_expert, num_experts).astype(dtype)


def _turns(block_expert, num_experts):
    """(blocks per turn, number of turns, i -> first block of turn i) over the blocks in use. The last turn is moved back to
    end where the blocks end, over some of the turn before."""
    at_once = min(BLOCKS_PER_TURN, len(block_expert))
    in_use = jnp.sum(block_expert < num_experts)
    return at_once, (in_use + at_once - 1) // at_once, lambda i: jnp.minimum(i * at_once, len(block_expert) - at_once)


def _scanned_rows(x, w, block_expert, transposed):
    w, block_expert = _to_pick_from(w, block_expert)
    product = "nbi,noi->nbo" if transposed else "nbi,nio->nbo"
    xs, stored = _blocks(x, block_expert), _STORED.get(x.dtype.name, x.dtype)
    at_once, turns, first = _turns(block_expert, len(w))

    def turn(i, out):
        some, experts = (lax.dynamic_slice_in_dim(of, first(i), at_once) for of in (xs, block_expert))
        blocks = jnp.einsum(product, some, _unpacked(w[experts], x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(out, lax.bitcast_convert_type(blocks, stored), first(i), 0)

    out = lax.fori_loop(0, turns, turn, jnp.zeros((*xs.shape[:2], w.shape[1 if transposed else 2]), stored))
    return lax.bitcast_convert_type(out, x.dtype).reshape(len(x), -1)


def _scanned_weights(x, y, block_expert, num_experts, dtype):
    xs, ys = _blocks(x, block_expert), _blocks(y, block_expert)
    at_once, turns, first = _turns(block_expert, num_experts)

    def turn(i, total):
        some_x, some_y, experts = (lax.dynamic_slice_in_dim(of, first(i), at_once) for of in (xs, ys, block_expert))
        seen = first(i) + jnp.arange(at_once) < i * at_once
        return total.at[jnp.where(seen, num_experts, experts)].add(outer_sum(some_x, some_y), mode="drop")

    return lax.fori_loop(0, turns, turn, jnp.zeros((num_experts, x.shape[-1], y.shape[-1]), jnp.float32)).astype(dtype)


# Kernels are imported where a program uses them: Pallas for GPUs and TPUs takes longer to import than jax itself, and a CPU
# needs neither.


def _tpu_rows(x, w, block_expert, transposed):
    from model.kernels import grouped_matmul_tpu

    return grouped_matmul_tpu.rows(x, _unpacked(w, x.dtype), block_expert, transposed)


def _tpu_weights(x, y, block_expert, num_experts, dtype):
    from model.kernels import grouped_matmul_tpu

    return grouped_matmul_tpu.weights(x, y, block_expert, num_experts, dtype)


def _hopper_rows(x, w, block_expert, transposed):
    from model.kernels import grouped_matmul_decode, grouped_matmul_gpu, grouped_matmul_row

    block, picked = len(x) // len(block_expert), _to_pick_from(w, block_expert)
    if block == 1 and not transposed and grouped_matmul_row.takes(x.dtype, picked[0]):
        return grouped_matmul_row.rows(x, *picked)
    if not transposed and grouped_matmul_decode.takes(x.dtype, block, picked[0]):
        return grouped_matmul_decode.rows(x, *picked)
    if grouped_matmul_gpu.takes(x.dtype, block, *w.shape[1:]):
        return grouped_matmul_gpu.rows(x, _unpacked(w, x.dtype), block_expert, transposed)
    if block > 1:
        _say_slow("products of experts go", x.dtype, w.shape[1:], block, grouped_matmul_gpu.STEP)
    return _batched_rows(x, w, block_expert, transposed)


def _hopper_weights(x, y, block_expert, num_experts, dtype):
    from model.kernels import grouped_matmul_gpu

    block = len(x) // len(block_expert)
    if not grouped_matmul_gpu.takes(x.dtype, block, x.shape[1], y.shape[1]):
        _say_slow("gradients of experts go", x.dtype, (x.shape[1], y.shape[1]), block, grouped_matmul_gpu.STEP)
        return _batched_weights(x, y, block_expert, num_experts, dtype)
    return grouped_matmul_gpu.weights(x, y, block_expert, num_experts, dtype)


def _say_slow(what: str, dtype, widths: tuple[int, int], block: int, step: int) -> None:
    warnings.warn(
        f"{what} through XLA, which copies weights for every block of rows: the Hopper kernels take 16-bit floats, widths of "
        f"whole {step}s (in blocks of 64 rows above {step}) and blocks of 64 or 128 rows, which every expert must have, not "
        f"{dtype.name}, {widths[0]} x {widths[1]} and blocks of {block}",
        stacklevel=3,
    )


_STORED = {"bfloat16": jnp.uint16} if jax.__version_info__ < (0, 11) else {}
"""Up to jax 0.10, XLA's CPU backend widens a whole bfloat16 array and narrows it again wherever a part is written."""

BLOCKS_PER_TURN = 8 if jax.__version_info__ >= (0, 11) else 1
"""How many blocks `scanned` multiplies at once, with a copy of each one's weights. A block is too small for XLA to put on
several cores, a batch of them is not; up to jax 0.10 it puts neither there, and copying weights only costs time."""


IMPLEMENTATIONS = {
    "reference": GroupedMatmul(_reference_rows, _reference_weights),
    "batched": GroupedMatmul(_batched_rows, _batched_weights),
    "scanned": GroupedMatmul(_scanned_rows, _scanned_weights),
    "tpu": GroupedMatmul(_tpu_rows, _tpu_weights),
    "hopper": GroupedMatmul(_hopper_rows, _hopper_weights),
}
"""reference: dense over all experts, the definition. batched: one batched product over blocks with gathered weights.
scanned: some blocks after others, so that few weights are copied and blocks of nobody cost nothing (bench/grouped_matmul.py).
tpu: model/kernels/grouped_matmul_tpu.py. hopper: grouped_matmul_gpu.py for blocks of 64 rows and more,
grouped_matmul_decode.py for the forward product of smaller ones, grouped_matmul_row.py of single rows, batched for what none
takes (float32, odd widths). Except for the last two, kernels take whole weights only: a layer of four-bit experts is unpacked
before them."""

SINGLE_ROWS = 32
"""Up to so many rows get blocks of their own on Hopper. Then hardly an expert has two, whose weights would be read twice:
four tokens with six to eight experts each."""


def implementation(platform: str) -> str:
    """Which entry the platform uses."""
    if platform == "hopper":
        from model.kernels import grouped_matmul_gpu

        return "hopper" if grouped_matmul_gpu.AVAILABLE else "batched"
    return {"cpu": "scanned", "tpu": "tpu"}.get(platform, "batched")


FEW_ROWS = 512
"""Up to so many pairs of tokens and experts, blocks on Hopper are those of decoding."""


def block_rows(rows: int, num_experts: int, platform: str = "cpu", trained: bool = False) -> int:
    """Rows per block: at most a quarter of an expert's mean rows, which keeps the padding of each expert to whole blocks
    under about an eighth, and no more than fill the platform's matrix unit; but at least 8, whatever the mean. A TPU's
    holds a tile of weights while rows stream past it: few rows per tile leave it loading weights. On Hopper an expert with
    the rows for it gets the 64 of a large matrix instruction, else the 16 of a small one, and a few rows in all are blocks
    of their own. Where gradients are asked for (`trained`) there are no 16: the kernels that read weights once have 64."""
    if platform == "hopper" and rows <= SINGLE_ROWS:
        return 1
    mean = rows // num_experts
    fewest = (64 if mean >= 64 or trained and rows > FEW_ROWS else 16) if platform == "hopper" else 8
    most = 512 if platform == "tpu" else 128
    return min(max(1 << (max(mean // 4, 1).bit_length() - 1), fewest), most)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "E D F"] | Int4Weight | InStack, block_expert: Int[Array, "M/b"], name: str
) -> Float[Array, "M F"]:
    """Block i of `x` times w[block_expert[i]], where that is E zeros from zeros; `name` is a key of IMPLEMENTATIONS.
    `block_expert` ascends, but for blocks of one row, which "batched" and "hopper" take in any order. An Int4Weight gives what
    its unpacked weights give; it and an InStack have no gradient."""
    return IMPLEMENTATIONS[name].rows(x, w, block_expert, False)


def _forward(x, w, block_expert, name):
    return IMPLEMENTATIONS[name].rows(x, w, block_expert, False), (x, w, block_expert)


def gradients(name: str, saved: tuple, y: Float[Array, "M F"]) -> tuple:
    """Of x and w for the cotangent y; saved: (x, w, block_expert)."""
    x, w, block_expert = saved
    dx = IMPLEMENTATIONS[name].rows(y, w, block_expert, True)
    dw = IMPLEMENTATIONS[name].weights(x, y, block_expert, len(w), w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, gradients)
