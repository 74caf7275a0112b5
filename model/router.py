"""The sigmoid router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): choose by biased score, weigh by unbiased score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from configs.param_spec import Matrix
from configs.schema import ModelConfig
from model.call import Call
from model.declare import Declare
from model.shards import ONE_DEVICE, Shards

SUM_EPS = 1e-20
"""Added to sums of scores that are divided by, as the released models do for gates."""


def gate_scale(experts: int, per_token: int, samples: int = 20000) -> float:
    """routed_scaling_factor that keeps the routed output's size: E[1/|p|] of random gates (Moonlight, appendix C)."""
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal((samples, experts))))
    top = np.sort(scores, axis=1)[:, -per_token:]
    top /= top.sum(1, keepdims=True)
    return round(float(np.mean(1 / np.linalg.norm(top, axis=1))), 3)


@jax.custom_jvp
def quotient(a: Array, b: Array) -> Array:
    """a / b, whose derivative (da - db * a / b) / b is finite wherever a / b and 1 / b are. Autodiff would form 1 / b^2, which
    float32 does not hold for b under 5e-20: a token that no expert wants has scores like that."""
    return a / b


@quotient.defjvp
def _quotient_derivative(primals, tangents):
    (a, b), (da, db) = primals, tangents
    out = a / b
    return out, (da - out * db) / b


@jax.custom_vjp
def exact_product(x_ND: Float[Array, "N D"], weight_DE: Float[Array, "D E"]) -> Float[Array, "N E"]:
    """x @ weight in float32 where both hold values of bfloat16 (x is one, the weight float32): the products are exact, so one
    pass through the matrix units gives what float32 arithmetic gives, which takes many or none of them.

    The gradient of the logits is float32: it is cut into the three bfloat16 numbers whose sum it is, which are multiplied side
    by side, in one product."""
    return jnp.dot(x_ND, weight_DE.astype(x_ND.dtype), preferred_element_type=jnp.float32)


def _backward(saved, g_NE):
    x_ND, weight_DE = saved
    parts_N3E = jnp.concatenate(in_three(g_NE), axis=1)
    weights_3ED = jnp.tile(weight_DE.astype(x_ND.dtype).T, (3, 1))
    dx_ND = jnp.dot(parts_N3E, weights_3ED, preferred_element_type=jnp.float32)
    dw_D3E = jnp.dot(x_ND.T, parts_N3E, preferred_element_type=jnp.float32)
    return dx_ND.astype(x_ND.dtype), dw_D3E.reshape(len(weight_DE), 3, -1).sum(1)


exact_product.defvjp(lambda x, weight: (exact_product(x, weight), (x, weight)), _backward)


def in_three(x: Float[Array, "..."]) -> tuple[Array, Array, Array]:
    """float32 as a sum of three bfloat16 numbers: 24 bits of mantissa are three times eight."""
    parts, rest = [], x
    for _ in range(3):
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)  # which XLA may not leave out
        parts.append(part.astype(jnp.bfloat16))
        rest -= part
    return tuple(parts)


class Router(nnx.Module):
    """Scores, choice and gate weights, all in float32 or as exact."""

    def __init__(self, cfg: ModelConfig, declare: Declare):
        self.cfg = cfg
        D, E = cfg.hidden_size, cfg.n_routed_experts
        self.weight = declare(
            "router",
            (D, E),
            ("embed", "experts"),
            init=cfg.initializer_range,
            update="muon",
            matrix=Matrix(("embed",), ("experts",)),
            hf="gate.weight",
        )
        self.bias = declare(
            "router_bias",
            (E,),
            ("experts",),
            init="zeros",
            update="router_bias",
            decay=False,
            served="float32",
            hf="gate.e_score_correction_bias",
        )

    def __call__(
        self, x_ND: Float[Array, "N D"], call: Call
    ) -> tuple[Int[Array, "N K"], Float[Array, "N K"], Float[Array, "N E"]]:
        """Chosen experts, their gate weights, and all scores. The bias moves the choice only."""
        cfg = self.cfg
        weight = call.exact_weight(self.weight)
        served_in_bf16 = "bfloat16" in (call.serving.dtype, self.weight[...].dtype)  # rounded to it here, or stored so
        if call.platform != "cpu" and served_in_bf16 and x_ND.dtype == "bfloat16":
            logits = exact_product(x_ND, weight)
        else:
            logits = jnp.dot(x_ND.astype(jnp.float32), weight, precision="highest")
        scores = jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores + self.bias[...])
        if cfg.n_group > 1:
            choice = self._limit_groups(choice)
        experts = checkpoint_name(jax.lax.top_k(choice, cfg.num_experts_per_tok)[1], "routing")
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if cfg.norm_topk_prob:
            weights = quotient(weights, jnp.sum(weights, axis=-1, keepdims=True) + SUM_EPS)
        return experts, weights * cfg.routed_scaling_factor, scores

    def _limit_groups(self, choice_NE: Array) -> Array:
        """Only the topk_group groups with the largest sum of their two best biased scores stay eligible."""
        cfg = self.cfg
        grouped = choice_NE.reshape(len(choice_NE), cfg.n_group, -1)
        best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        kept = jax.lax.top_k(best_two, cfg.topk_group)[1]
        keep = jnp.any(kept[:, :, None] == jnp.arange(cfg.n_group), axis=1)
        return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(choice_NE.shape)


def expert_counts(experts_NK: Int[Array, "N K"], valid_N: Array, num_experts: int) -> Float[Array, "E"]:
    """Tokens sent to each expert, padding left out."""
    weights = jnp.broadcast_to(valid_N[:, None], experts_NK.shape).astype(jnp.float32)
    return jnp.zeros(num_experts, jnp.float32).at[experts_NK.reshape(-1)].add(weights.reshape(-1))


def sequence_balance_loss(
    experts_BSK: Int[Array, "B S K"], scores_BSE: Float[Array, "B S E"], valid_BS: Array, shards: Shards = ONE_DEVICE
) -> Float[Array, ""]:
    """DeepSeek-V3's equations 17-20, without alpha, summed over rows: sum_i f_i P_i per row, 1 at perfect balance.

    Where a row's positions lie on several devices, each gives its positions' share of the sum.
    """
    E, K = scores_BSE.shape[-1], experts_BSK.shape[-1]
    valid = valid_BS.astype(jnp.float32)
    tokens_B = jnp.maximum(shards.total(valid.sum(-1), ("context",)), 1.0)
    chosen_BSE = jax.nn.one_hot(experts_BSK, E).sum(2) * valid[..., None]
    f_BE = shards.total(jax.lax.stop_gradient(chosen_BSE.sum(1)), ("context",)) * E / (K * tokens_B[:, None])
    share_BSE = quotient(scores_BSE, jnp.sum(scores_BSE, axis=-1, keepdims=True) + SUM_EPS)
    p_BE = jnp.sum(share_BSE * valid[..., None], axis=1) / tokens_B[:, None]
    return jnp.sum(f_BE * p_BE)
