"""The network: embedding, leading dense layers, scanned MoE layers, final norm, head."""

from __future__ import annotations

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from configs.param_spec import Matrix, ParamSpec, Specs
from configs.schema import ModelConfig
from model import embedding, in_stack, remat, stacked
from model.call import Call, LayerAux, ModelAux, MoEAux
from model.declare import Declare
from model.layers import FeedForward, RMSNorm
from model.mla import MLA
from model.moe import ON_GRID, MoE

FEW = 4
"""Tokens of a decoding step for which reading every weight once for each still beats a copy of the layer's."""


class Layer(nnx.Module):
    """Pre-norm residual layer; `feed_forward` is dense or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, declare: Declare, moe: bool):
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_norm = RMSNorm(declare, "input_norm", D, "embed", eps, "input_layernorm")
        self.attention = MLA(cfg, declare.at("attn", "self_attn."))
        self.post_norm = RMSNorm(declare, "post_norm", D, "embed", eps, "post_attention_layernorm")
        self.moe = moe
        mlp = declare.at("mlp", "mlp.")
        self.feed_forward = MoE(cfg, mlp) if moe else FeedForward(cfg, mlp, cfg.intermediate_size)

    def __call__(self, x_BSD: Array, call: Call) -> tuple[Array, LayerAux, MoEAux | None, Array]:
        """New residual stream, attention and routing measurements, latents for a decode cache."""
        attended, aux, latents = self.attention(self.input_norm(x_BSD, call), call)
        x_BSD, moe_aux = self._feed(x_BSD + attended, call)
        return x_BSD, aux, moe_aux, latents

    def decode(self, x_BSD: Array, cache_LBTR: Array, layer: int | Array, call: Call) -> tuple[Array, Array]:
        attended, cache_LBTR = self.attention.decode(self.input_norm(x_BSD, call), cache_LBTR, layer, call)
        return self._feed(x_BSD + attended, call)[0], cache_LBTR

    def leave_in(self, stack: Layer, layer: Int[Array, ""], tokens: int, call: Call) -> None:
        """Leave in the stacked module what is picked or read there: the experts, and on Hopper for a few tokens the matrices that
        every token needs, which the kernel for single rows then reads once for each (model/project.py)."""
        take = partial(in_stack.leave_in, layer=layer, dtype=call.dtype)
        take(stack.feed_forward, self.feed_forward, ON_GRID)
        if call.platform == "hopper" and tokens <= FEW:
            queries = ("q",) if self.attention.cfg.q_lora_rank is None else ("q_a", "q")
            take(stack.attention, self.attention, (*queries, "kv_a", "o"))
            take(stack.feed_forward.shared, self.feed_forward.shared, ("gate_up", "down"))

    def _feed(self, x_BSD: Array, call: Call) -> tuple[Array, MoEAux | None]:
        normed = self.post_norm(x_BSD, call)
        out, aux = self.feed_forward(normed, call) if self.moe else (self.feed_forward(normed, call), None)
        return x_BSD + out, aux


class Transformer(nnx.Module):
    """Kimi K2 / DeepSeek-V3. Dense layers are unrolled, MoE layers are one stacked module that is scanned."""

    def __init__(self, cfg: ModelConfig, declare: Declare):
        self.cfg = cfg
        V, D, L, dense = cfg.vocab_size, cfg.hidden_size, cfg.num_hidden_layers, cfg.first_k_dense_replace
        std, layer = cfg.initializer_range, "model.layers.{layer}."
        self.embed = declare("embed", (V, D), ("vocab", "embed"), init=std, update="adamw", hf="model.embed_tokens.weight")
        self.dense = nnx.List(
            [Layer(cfg, declare.at(f"dense.{i}").over_layers((i,), layer, stacked=False), moe=False) for i in range(dense)]
        )
        self.moe = Layer(cfg, declare.at("moe").over_layers(tuple(range(dense, L)), layer, stacked=True), moe=True)
        self.final_norm = RMSNorm(declare, "final_norm", D, "embed", cfg.rms_norm_eps, "model.norm")
        self.head = declare(
            "head",
            (D, V),
            ("embed", "vocab"),
            init=std,
            update="adamw",
            matrix=Matrix(("embed",), ("vocab",)),
            hf="lm_head.weight",
        )

    def __call__(
        self, tokens_BS: Int[Array, "B S"], call: Call, sums: stacked.Sums | None = None
    ) -> tuple[Float[Array, "B S D"], ModelAux, Array]:
        """Final normed hidden states, measurements per layer, and the latents [L, B, S, R+rope] of all layers. The gradients
        of the stacked layers are added to `sums`, where there are any (model/stacked.py)."""
        x = embedding.lookup(self.embed, tokens_BS, call)
        measured = []
        for layer in self.dense:
            x, aux, _, latents = remat.wrap(layer, call.remat)(x, call)
            measured.append((aux, latents))

        def body(x, layer, number, setting):
            call, masters = setting
            layer.feed_forward.read_in(masters, number)
            x, aux, moe_aux, latents = remat.wrap(layer, call.remat)(x, call)
            return x, (aux, moe_aux, latents)

        setting = call, self.moe.feed_forward.masters(call)
        if sums is None:
            one = lambda x, numbered: body(x, *numbered, setting)  # noqa: E731
            x, measured_moe = jax.lax.scan(one, x, stacked.numbered(self.moe), unroll=call.unroll)
        else:
            x, measured_moe = stacked.run(body, call.unroll, x, self.moe, sums, setting)
        aux, moe_aux, latents = measured_moe
        for layer_aux, layer_latents in reversed(measured):
            aux = jax.tree.map(lambda one, stack: jnp.concatenate([one[None], stack]), layer_aux, aux)
            latents = jnp.concatenate([layer_latents[None], latents])
        return self.final_norm(x, call), ModelAux(aux, moe_aux, jnp.zeros(())), latents

    def decode(
        self, tokens_BS: Int[Array, "B S"], cache_LBTR: Float[Array, "L B T R+rope"], call: Call
    ) -> tuple[Float[Array, "B S D"], Array]:
        """Final normed hidden states of tokens that go on where the cache ends (their places are `call.positions`), and
        the cache with them. The cache is a loop's carry here, so it is written in place. Weights are as served."""
        x = call.weight(self.embed)[tokens_BS]
        for index, layer in enumerate(self.dense):
            x, cache_LBTR = layer.decode(x, cache_LBTR, index, call)

        def body(carry, layer_and_index):
            layer, index = layer_and_index
            layer.leave_in(self.moe, index - len(self.dense), x.size // x.shape[-1], call)
            return layer.decode(*carry, index, call), None

        indices = jnp.arange(len(self.dense), self.cfg.num_hidden_layers)
        (x, cache_LBTR), _ = jax.lax.scan(body, (x, cache_LBTR), (self.moe, indices))
        return self.final_norm(x, call), cache_LBTR

    def logits(self, hidden: Float[Array, "... D"], call: Call) -> Float[Array, "... V"]:
        """float32 logits."""
        return jnp.dot(hidden, call.weight(self.head), preferred_element_type=jnp.float32)


@lru_cache(maxsize=8)
def _skeleton(cfg: ModelConfig) -> tuple[nnx.GraphDef, tuple, dict[str, ParamSpec]]:
    table: dict[str, ParamSpec] = {}
    graph, state = nnx.split(Transformer(cfg, Declare(table)))
    by_spec = {id(spec): path for path, spec in table.items()}
    leaves = tuple((key, param, by_spec[id(param.spec)]) for key, param in nnx.to_flat_state(state))
    return graph, leaves, table


def param_specs(cfg: ModelConfig) -> Specs:
    """The table: path of every stored array to its spec."""
    return dict(_skeleton(cfg)[2])


def bind(cfg: ModelConfig, params: dict[str, Array], partly: bool = False) -> Transformer:
    """The network with these arrays; `params` has the table's keys, or `partly` those of the modules that will be used."""
    graph, leaves, _ = _skeleton(cfg)
    arrays = {path: jnp.zeros(()) for _, _, path in leaves} | params if partly else params
    return nnx.merge(graph, nnx.from_flat_state([(key, param.replace(arrays[path])) for key, param, path in leaves]))
