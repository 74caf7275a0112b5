"""The mixture-of-experts block: route, bring tokens and experts together, combine, plus the shared expert."""

from __future__ import annotations

from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from configs.param_spec import Matrix
from configs.schema import ModelConfig
from model import router, transport
from model.call import Call, MoEAux
from model.declare import Declare
from model.layers import FeedForward, gate_up_names
from quant.served import Master

ON_GRID = "gate_up", "down"
"""The routed experts' arrays."""


class MoE(nnx.Module):
    """DeepSeekMoE (arXiv 2401.06066) with the sigmoid router; routed experts live on the INT4 grid."""

    def __init__(self, cfg: ModelConfig, declare: Declare):
        self.cfg = cfg
        D, E, F, std = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.initializer_range
        self.router = router.Router(cfg, declare)
        self.gate_up = declare(
            "experts_gate_up",
            (E, D, 2, F),
            ("experts", "embed", "gate_up", "expert_hidden"),
            init=std,
            update="muon",
            matrix=Matrix(("embed",), ("expert_hidden",)),
            on_grid=True,
            hf=gate_up_names("experts.{expert}."),
        )
        self.down = declare(
            "experts_down",
            (E, F, D),
            ("experts", "expert_hidden", "embed"),
            init=std,
            update="muon",
            matrix=Matrix(("expert_hidden",), ("embed",)),
            on_grid=True,
            hf="experts.{expert}.down_proj.weight",
        )
        self.shared = FeedForward(cfg, declare.at("shared", "shared_experts."), cfg.shared_hidden)

    def __call__(self, x_BSD: Float[Array, "B S D"], call: Call) -> tuple[Float[Array, "B S D"], MoEAux]:
        B, S, D = x_BSD.shape
        x_ND, valid_N = x_BSD.reshape(-1, D), (call.segments > 0).reshape(-1)
        experts_NK, gates_NK, scores_NE = self.router(x_ND, call)
        weights = call.weight(self.gate_up, joined=True), call.weight(self.down)
        routed = transport.routed(x_ND, experts_NK, gates_NK, weights, call.shards, call.platform, call.transport)
        out = call.shards.total_over_tensor(routed.reshape(B, S, D) + self.shared.part(x_BSD, call), self.down.spec)
        aux = MoEAux(
            router.expert_counts(experts_NK, valid_N, self.cfg.n_routed_experts),
            router.sequence_balance_loss(
                experts_NK.reshape(B, S, -1), scores_NE.reshape(B, S, -1), call.segments > 0, call.shards
            ),
        )
        return out, aux

    def masters(self, call: Call) -> dict[str, Array]:
        """Of all layers, what is read where it lies and not cut out for a layer: on Hopper GPUs the experts, from the step on at
        which nothing but their values on the grid is used."""
        whole = call.settled and call.platform == "hopper"
        return {name: lax.stop_gradient(getattr(self, name).get_value()) for name in ON_GRID} if whole else {}

    def read_in(self, masters: dict[str, Array], layer: Int[Array, ""]) -> None:
        """A layer's experts are read in these stacks."""
        for name, stack in masters.items():
            param = getattr(self, name)
            setattr(self, name, param.replace(Master(param.get_value(), stack, layer)))
