"""The mixture-of-experts block: route, sort, two grouped matmuls, combine, plus the shared expert."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from configs.param_spec import Matrix
from configs.schema import ModelConfig
from model import dispatch, router
from model.call import Call, MoEAux
from model.declare import Declare
from model.grouped_matmul import block_rows, grouped_matmul, implementation
from model.layers import FeedForward, gate_up_names, swiglu


class MoE(nnx.Module):
    """DeepSeekMoE (arXiv 2401.06066) with the sigmoid router; routed experts live on the INT4 grid."""

    def __init__(self, cfg: ModelConfig, declare: Declare):
        self.cfg = cfg
        D, E, F, std = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.initializer_range
        self.router = router.Router(cfg, declare)
        self.gate_up = declare("experts_gate_up", (E, D, 2, F), ("experts", "embed", "gate_up", "expert_hidden"),
                               init=std, update="muon", matrix=Matrix(("embed",), ("expert_hidden",)), on_grid=True,
                               hf=gate_up_names("experts.{expert}."))
        self.down = declare("experts_down", (E, F, D), ("experts", "expert_hidden", "embed"), init=std, update="muon",
                            matrix=Matrix(("expert_hidden",), ("embed",)), on_grid=True,
                            hf="experts.{expert}.down_proj.weight")
        self.shared = FeedForward(cfg, declare.at("shared", "shared_experts."), cfg.shared_hidden)

    def __call__(self, x_BSD: Float[Array, "B S D"], call: Call) -> tuple[Float[Array, "B S D"], MoEAux]:
        B, S, D = x_BSD.shape
        x_ND, valid_N = x_BSD.reshape(-1, D), (call.segments > 0).reshape(-1)
        experts_NK, gates_NK, scores_NE = self.router(x_ND, call)
        routed = self.routed(x_ND, experts_NK, gates_NK, call).reshape(B, S, D)
        aux = MoEAux(router.expert_counts(experts_NK, valid_N, self.cfg.n_routed_experts),
                     router.sequence_balance_loss(experts_NK.reshape(B, S, -1), scores_NE.reshape(B, S, -1),
                                                  call.segments > 0))
        return routed + self.shared(x_BSD, call), aux

    def routed(self, x_ND: Array, experts_NK: Array, gates_NK: Array, call: Call) -> Float[Array, "N D"]:
        """Sum over each token's experts of gate * expert(x). The gate is applied before the down projection, which
        is linear: the K outputs then only need adding, and need not be kept for the gate's gradient."""
        E, D = self.cfg.n_routed_experts, x_ND.shape[-1]
        to = checkpoint_name(dispatch.plan(experts_NK, E, block_rows(experts_NK.size, E)), "routing")
        name = implementation(call.platform)
        rows = dispatch.to_slots(x_ND, to)
        gate_up = grouped_matmul(rows, call.weight(self.gate_up).reshape(E, D, -1), to.block_expert, name)
        gates = dispatch.gates_to_slots(gates_NK, to)[:, None]
        hidden = (swiglu(gate_up).astype(jnp.float32) * gates).astype(x_ND.dtype)
        return dispatch.from_slots(grouped_matmul(hidden, call.weight(self.down), to.block_expert, name), to)
