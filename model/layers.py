"""The two small layers everything is made of: RMSNorm and the SwiGLU feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from configs.param_spec import HFTensor, Matrix
from configs.schema import ModelConfig
from model.call import Call
from model.declare import Declare
from model.project import project
from model.remat import HIDDEN


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, in float32 (arXiv 1910.07467)."""

    def __init__(self, declare: Declare, name: str, size: int, axis: str, eps: float, hf: str):
        self.eps = eps
        self.weight = declare(name, (size,), (axis,), init="ones", update="adamw", hf=f"{hf}.weight")

    def __call__(self, x: Float[Array, "... D"], call: Call) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * call.exact_weight(self.weight)).astype(x.dtype)


def gate_up_names(prefix: str) -> tuple[HFTensor, ...]:
    """The two Hugging Face tensors that one gate_up array holds."""
    return tuple(HFTensor(f"{prefix}{half}_proj.weight", (("gate_up", i),)) for i, half in enumerate(("gate", "up")))


def swiglu(gate_up: Float[Array, "... 2*F"]) -> Float[Array, "... F"]:
    """silu(gate) * up (arXiv 2002.05202); the last axis holds gate, then up. Computed in float32."""
    gate, up = jnp.split(gate_up, 2, axis=-1)  # before the cast: XLA for TPUs keeps an array that is cast and then cut
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate_up.dtype)


class FeedForward(nnx.Module):
    """SwiGLU block of the dense layers and of the shared experts."""

    def __init__(self, cfg: ModelConfig, declare: Declare, hidden: int):
        D, F, std = cfg.hidden_size, hidden, cfg.initializer_range
        self.gate_up = declare(
            "gate_up",
            (D, 2, F),
            ("embed", "gate_up", "hidden"),
            init=std,
            update="muon",
            matrix=Matrix(("embed",), ("hidden",)),
            hf=gate_up_names(""),
        )
        self.down = declare(
            "down",
            (F, D),
            ("hidden", "embed"),
            init=std,
            update="muon",
            matrix=Matrix(("hidden",), ("embed",)),
            hf="down_proj.weight",
        )

    def __call__(self, x: Float[Array, "B S D"], call: Call) -> Float[Array, "B S D"]:
        return call.shards.total_over_tensor(self.part(x, call), self.down.spec)

    def part(self, x: Float[Array, "B S D"], call: Call) -> Float[Array, "B S D"]:
        """What the hidden units of this device add."""
        gate_up = checkpoint_name(project("BSD,DF->BSF", x, call.weight(self.gate_up, joined=True)), HIDDEN)
        return project("BSF,FD->BSD", swiglu(gate_up), call.weight(self.down))
