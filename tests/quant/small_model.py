"""A hand-made ParamSpec table of the family, and random weights for it; the tests here must not need model/."""

from __future__ import annotations

import numpy as np

from configs.param_spec import HFTensor, Matrix, ParamSpec
from configs.schema import ModelConfig, QuantConfig

MODEL = ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=2,
                    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
                    intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
                    bos_token_id=60, eos_token_id=61, pad_token_id=62)
INT4 = QuantConfig()
PLAIN = QuantConfig(grid="none")


def _one(name: str, **more) -> tuple[HFTensor, ...]:
    return (HFTensor(f"model.layers.{{layer}}.{name}.weight", **more),)


def _gate_up(stem: str) -> tuple[HFTensor, ...]:
    return tuple(HFTensor(f"model.layers.{{layer}}.{stem}{half}_proj.weight", index=(("gate_up", i),))
                 for i, half in enumerate(("gate", "up")))


def specs_of(m: ModelConfig) -> dict[str, ParamSpec]:
    D, H, R, F, E = m.hidden_size, m.num_attention_heads, m.kv_lora_rank, m.moe_intermediate_size, m.n_routed_experts
    specs: dict[str, ParamSpec] = {}

    def add(path, shape, axes, hf, matrix=None, layers=(), **more):
        stacked = path.startswith("moe.")
        specs[path] = ParamSpec(((len(layers),) if stacked else ()) + shape, (("layers",) if stacked else ()) + axes,
                                0.02, "muon" if matrix else "adamw", hf, matrix=matrix, layers=layers, **more)

    def block(prefix, layers):
        a = f"{prefix}.attn"
        add(f"{a}.q_a", (D, m.q_lora_rank), ("embed", "q_lora"), _one("self_attn.q_a_proj"),
            Matrix(("embed",), ("q_lora",)), layers)
        add(f"{a}.q_a_norm", (m.q_lora_rank,), ("q_lora",), _one("self_attn.q_a_layernorm"), layers=layers)
        add(f"{a}.q_b", (m.q_lora_rank, H, m.qk_head_dim), ("q_lora", "heads", "qk_dim"), _one("self_attn.q_b_proj"),
            Matrix(("q_lora",), ("qk_dim",)), layers)
        add(f"{a}.kv_a", (D, R + m.qk_rope_head_dim), ("embed", "kv_a"), _one("self_attn.kv_a_proj_with_mqa"),
            Matrix(("embed",), ("kv_a",)), layers)
        add(f"{a}.kv_a_norm", (R,), ("kv_lora",), _one("self_attn.kv_a_layernorm"), layers=layers)
        add(
            f"{a}.kv_b",
            (R, H, m.qk_nope_head_dim + m.v_head_dim),
            ("kv_lora", "heads", "kv_b"),
            _one("self_attn.kv_b_proj"),
            Matrix(("kv_lora",), ("kv_b",)),
            layers,
        )
        add(
            f"{a}.o",
            (H, m.v_head_dim, D),
            ("heads", "v_dim", "embed"),
            _one("self_attn.o_proj"),
            Matrix(("heads", "v_dim"), ("embed",)),
            layers,
        )
        add(f"{prefix}.input_norm", (D,), ("embed",), _one("input_layernorm"), layers=layers)
        add(f"{prefix}.post_norm", (D,), ("embed",), _one("post_attention_layernorm"), layers=layers)

    def gate_up(path, stem, hidden, layers):
        add(
            f"{path}gate_up",
            (D, 2, hidden),
            ("embed", "gate_up", "hidden"),
            _gate_up(f"{stem}."),
            Matrix(("embed",), ("hidden",)),
            layers,
        )
        add(
            f"{path}down",
            (hidden, D),
            ("hidden", "embed"),
            _one(f"{stem}.down_proj"),
            Matrix(("hidden",), ("embed",)),
            layers,
        )

    add("embed", (m.vocab_size, D), ("vocab", "embed"), (HFTensor("model.embed_tokens.weight", transposed=False),))
    for i in range(m.first_k_dense_replace):
        block(f"dense.{i}", (i,))
        gate_up(f"dense.{i}.mlp.", "mlp", m.intermediate_size, (i,))
    moe = tuple(range(m.first_k_dense_replace, m.num_hidden_layers))
    block("moe", moe)
    add("moe.mlp.router", (D, E), ("embed", "experts"), _one("mlp.gate"), Matrix(("embed",), ("experts",)), moe)
    add(
        "moe.mlp.router_bias",
        (E,),
        ("experts",),
        (HFTensor("model.layers.{layer}.mlp.gate.e_score_correction_bias"),),
        layers=moe,
        served="float32",
    )
    add(
        "moe.mlp.experts_gate_up",
        (E, D, 2, F),
        ("experts", "embed", "gate_up", "expert_hidden"),
        _gate_up("mlp.experts.{expert}."),
        Matrix(("embed",), ("expert_hidden",)),
        moe,
        on_grid=True,
    )
    add(
        "moe.mlp.experts_down",
        (E, F, D),
        ("experts", "expert_hidden", "embed"),
        _one("mlp.experts.{expert}.down_proj"),
        Matrix(("expert_hidden",), ("embed",)),
        moe,
        on_grid=True,
    )
    gate_up("moe.mlp.shared_", "mlp.shared_experts", m.shared_hidden, moe)
    add("final_norm", (D,), ("embed",), (HFTensor("model.norm.weight"),))
    add("head", (D, m.vocab_size), ("embed", "vocab"), (HFTensor("lm_head.weight"),))
    return specs


def random_weights(specs: dict[str, ParamSpec], seed: int = 0, scale: float = 0.02) -> dict[str, np.ndarray]:
    """float32 masters; norms near one."""
    rng = np.random.default_rng(seed)
    return {path: (rng.normal(1.0, 0.1, spec.shape) if path.endswith("norm") else rng.normal(0, scale, spec.shape))
            .astype(np.float32) for path, spec in specs.items()}
