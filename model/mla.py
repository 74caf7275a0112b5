"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), expanded for training, absorbed for decoding."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from configs.param_spec import Matrix
from configs.schema import ModelConfig
from model import attention, latent_cache, rope
from model.call import Call, LayerAux
from model.declare import Declare
from model.layers import RMSNorm
from model.project import project

LATENT_EPS = 1e-6
"""Of the two latent norms: every released model uses it, whatever rms_norm_eps says."""

EXPANDED = 2 << 30
"""Bytes of keys and values that exist at a time: those of all 64 heads of Kimi K2 over 256K positions are 10.7 GB."""


def head_groups(heads: int, head: int) -> int:
    """In how many equal groups the keys and values of `heads` heads are expanded, of `head` bytes each: the fewest that fit."""
    return next((n for n in range(1, heads) if heads % n == 0 and heads // n * head <= EXPANDED), heads)


class MLA(nnx.Module):
    """Queries through a low-rank latent (or directly), keys and values from a shared latent, one shared rope key."""

    def __init__(self, cfg: ModelConfig, declare: Declare):
        self.cfg = cfg
        D, H, R, std = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.initializer_range
        nope, rot, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        clip_q = ((nope, 0.5), (rot, 1.0))
        if cfg.q_lora_rank is None:
            self.q = declare(
                "q",
                (D, H, nope + rot),
                ("embed", "heads", "qk_dim"),
                init=std,
                update="muon",
                matrix=Matrix(("embed",), ("qk_dim",)),
                clip_powers=clip_q,
                hf="q_proj.weight",
            )
        else:
            Q = cfg.q_lora_rank
            self.q_a = declare(
                "q_a",
                (D, Q),
                ("embed", "q_latent"),
                init=std,
                update="muon",
                matrix=Matrix(("embed",), ("q_latent",)),
                hf="q_a_proj.weight",
            )
            self.q_a_norm = RMSNorm(declare, "q_a_norm", Q, "q_latent", LATENT_EPS, "q_a_layernorm")
            self.q = declare(
                "q_b",
                (Q, H, nope + rot),
                ("q_latent", "heads", "qk_dim"),
                init=std,
                update="muon",
                matrix=Matrix(("q_latent",), ("qk_dim",)),
                clip_powers=clip_q,
                hf="q_b_proj.weight",
            )
        self.kv_a = declare(
            "kv_a",
            (D, R + rot),
            ("embed", "kv_latent"),
            init=std,
            update="muon",
            matrix=Matrix(("embed",), ("kv_latent",), (R, rot), split_by_choice=True),
            hf="kv_a_proj_with_mqa.weight",
        )
        self.kv_a_norm = RMSNorm(declare, "kv_a_norm", R, "kv_norm", LATENT_EPS, "kv_a_layernorm")
        self.kv_b = declare(
            "kv_b",
            (R, H, nope + v),
            ("kv_norm", "heads", "kv_dim"),
            init=std,
            update="muon",
            matrix=Matrix(("kv_norm",), ("kv_dim",), (nope, v)),
            clip_powers=((nope, 0.5), (v, 0.0)),
            hf="kv_b_proj.weight",
        )
        self.o = declare(
            "o",
            (H, v, D),
            ("heads", "v_dim", "embed"),
            init=std,
            update="muon",
            matrix=Matrix(("heads", "v_dim"), ("embed",)),
            hf="o_proj.weight",
        )

    def queries(self, x_BSD: Array, call: Call) -> tuple[Float[Array, "B S H nope"], Float[Array, "B S H rope"]]:
        """Unrotated and rotated parts."""
        if self.cfg.q_lora_rank is not None:
            x_BSD = self.q_a_norm(project("BSD,DR->BSR", x_BSD, call.weight(self.q_a)), call)
        q = project("BSR,RHd->BSHd", x_BSD, call.weight(self.q))
        q_nope, q_rope = jnp.split(q, [self.cfg.qk_nope_head_dim], axis=-1)
        return q_nope, rope.rotate(q_rope, *rope.rotation(self.cfg, call.positions))

    def latents(self, x_BSD: Array, call: Call) -> Float[Array, "B S R+rope"]:
        """What decoding caches per token: the normed key/value latent, then the rotated shared key."""
        latent, k_rope = jnp.split(project("BSD,DR->BSR", x_BSD, call.weight(self.kv_a)), [self.cfg.kv_lora_rank], axis=-1)
        k_rope = rope.rotate(k_rope, *rope.rotation(self.cfg, call.positions))
        return checkpoint_name(jnp.concatenate([self.kv_a_norm(latent, call), k_rope], axis=-1), "kv_latent")

    def __call__(self, x_BSD: Float[Array, "B S D"], call: Call) -> tuple[Array, LayerAux, Float[Array, "B S R+rope"]]:
        """Causal attention within segments: output [B, S, D], measurements, and the latents for a decode cache.

        Where the positions of a row lie on several devices, each has its own queries and gathers the latents of all
        positions: they are 1/36 of the keys and values of Kimi K2, which every device expands for its heads.
        """
        q = jnp.concatenate(self.queries(x_BSD, call), axis=-1)
        cached = self.latents(x_BSD, call)
        latents, segments = call.shards.all_positions(cached, 1), call.shards.all_positions(call.segments, 1)
        kv_b = call.weight(self.kv_b)
        count = head_groups(kv_b.shape[1], latents.size // latents.shape[-1] * (q.shape[-1] + self.cfg.v_head_dim) * q.itemsize)
        outs, max_logits = [], []
        for group in zip(jnp.split(q, count, axis=2), jnp.split(kv_b, count, axis=1)):
            if outs:  # one after the other, in the backward pass too: a scheduler in search of speed would take all at once
                *group, outs[-1] = lax.optimization_barrier((*group, outs[-1]))
            out, max_logit = self._expand_and_attend(*group, latents, segments, call)
            outs, max_logits = [*outs, out], [*max_logits, max_logit]
        out, max_logit = jnp.concatenate(outs, 2), jnp.concatenate(max_logits)
        out = project("BSHv,HvD->BSD", out, call.weight(self.o))
        return call.shards.total_over_tensor(out, self.o.spec), LayerAux(max_logit), cached

    def _expand_and_attend(
        self,
        q: Float[Array, "B S H nope+rope"],
        kv_b: Float[Array, "R H nope+v"],
        latents: Float[Array, "B T R+rope"],
        segments: Int[Array, "B T"],
        call: Call,
    ):
        """Output [B, S, H, v] and maximum logit of some heads; T: all positions, of which S are this device's."""
        cfg, nope = self.cfg, self.cfg.qk_nope_head_dim
        latent, k_rope = jnp.split(latents, [cfg.kv_lora_rank], axis=-1)
        # Two products, not one to be cut afterwards: the gradient would put the parts together again.
        k_nope, v = (project("BSR,RHd->BSHd", latent, w) for w in (kv_b[..., :nope], kv_b[..., nope:]))
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))], -1)
        at = call.shards.own_positions(jnp.arange(k.shape[1]), 0)
        return attention.causal(q, k, v, segments, at, rope.softmax_scale(cfg), call.platform)

    def decode(
        self, x_BSD: Array, cache_LBTR: Float[Array, "L B T R+rope"], layer: int | Int[Array, ""], call: Call
    ) -> tuple[Array, Float[Array, "L B T R+rope"]]:
        """A few new tokens per row against the cache, without expanding it: kv_b is absorbed into query and output.

        `call.positions` are the tokens' places in the cache, and what is cached behind a token's own is ignored.
        """
        rank = self.cfg.kv_lora_rank
        q_nope, q_rope = self.queries(x_BSD, call)
        cache_LBTR = latent_cache.write(cache_LBTR, layer, call.positions, self.latents(x_BSD, call))
        k_up, v_up = jnp.split(call.weight(self.kv_b), [self.cfg.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([project("BSHd,RHd->BSHR", q_nope, k_up), q_rope], axis=-1)
        context = latent_cache.attend(q, cache_LBTR, layer, call.positions, rope.softmax_scale(self.cfg), rank)
        out = project("BSHR,RHv->BSHv", context, v_up)
        return project("BSHv,HvD->BSD", out, call.weight(self.o)), cache_LBTR
