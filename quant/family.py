"""Tensor names and shapes of a DeepSeek-V3-family checkpoint, derived from config.json alone.

A second opinion beside the ParamSpec table: `verify` reads directories that this project did not write, and must not
take the exporter's word for what a directory should hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
)
"""Fields without which no shape is known."""

MODEL_TYPES = ("deepseek_v3", "kimi_k2")


@dataclass(frozen=True)
class Family:
    """A config of the family; Kimi K2.5 and later wrap it in `text_config` and prefix names with `language_model.`."""

    text_config: dict[str, Any]
    prefix: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> Family | None:
        text = config.get("text_config")
        if isinstance(text, dict) and text.get("model_type") in MODEL_TYPES:
            return cls(text, "language_model.")
        return cls(config, "") if config.get("model_type") in MODEL_TYPES else None

    @property
    def missing(self) -> list[str]:
        return [name for name in NEEDED if name not in self.text_config]

    @property
    def misstated(self) -> list[str]:
        """Needed fields that are there and hold no size; q_lora_rank may be null."""
        c = self.text_config
        sizes = [name for name in NEEDED if name in c] + ["q_lora_rank"] * (c.get("q_lora_rank") is not None)
        return [name for name in sizes if type(c[name]) is not int or c[name] < 0]

    def is_extra(self, name: str) -> bool:
        """Multi-token-prediction layers beyond the last, and anything outside the wrapped text model."""
        if not name.startswith(self.prefix):
            return True
        parts = name.removeprefix(self.prefix).split(".")
        return (
            parts[:2] == ["model", "layers"]
            and len(parts) > 2
            and parts[2].isdecimal()
            and int(parts[2]) >= self.text_config["num_hidden_layers"]
        )


def _mlp(stem: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.gate_proj.weight": (hidden, width),
        f"{stem}.up_proj.weight": (hidden, width),
        f"{stem}.down_proj.weight": (width, hidden),
    }


def _attention(c: dict[str, Any], stem: str) -> dict[str, tuple[int, ...]]:
    width, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    rank = c.get("q_lora_rank")
    query = (
        {f"{stem}.q_proj.weight": (heads * qk, width)}
        if rank is None
        else {
            f"{stem}.q_a_proj.weight": (rank, width),
            f"{stem}.q_a_layernorm.weight": (rank,),
            f"{stem}.q_b_proj.weight": (heads * qk, rank),
        }
    )
    return query | {
        f"{stem}.kv_a_proj_with_mqa.weight": (latent + c["qk_rope_head_dim"], width),
        f"{stem}.kv_a_layernorm.weight": (latent,),
        f"{stem}.kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent),
        f"{stem}.o_proj.weight": (width, heads * c["v_head_dim"]),
    }


def expected_tensors(family: Family) -> dict[str, tuple[int, ...]]:
    """{name: shape} as unpacked weights; empty where config.json does not define the network."""
    c, prefix = family.text_config, family.prefix
    if family.missing or family.misstated:
        return {}
    width, vocab = c["hidden_size"], c["vocab_size"]
    shapes = {f"{prefix}model.embed_tokens.weight": (vocab, width), f"{prefix}model.norm.weight": (width,)}
    if not c.get("tie_word_embeddings", False):
        shapes[f"{prefix}lm_head.weight"] = (vocab, width)
    for i in range(c["num_hidden_layers"]):
        stem = f"{prefix}model.layers.{i}"
        shapes |= {f"{stem}.input_layernorm.weight": (width,), f"{stem}.post_attention_layernorm.weight": (width,)}
        shapes |= _attention(c, f"{stem}.self_attn")
        if i < c["first_k_dense_replace"]:
            shapes |= _mlp(f"{stem}.mlp", c["intermediate_size"], width)
            continue
        hidden, experts = c["moe_intermediate_size"], c["n_routed_experts"]
        shapes |= {f"{stem}.mlp.gate.weight": (experts, width), f"{stem}.mlp.gate.e_score_correction_bias": (experts,)}
        shapes |= _mlp(f"{stem}.mlp.shared_experts", hidden * c["n_shared_experts"], width)
        for e in range(experts):
            shapes |= _mlp(f"{stem}.mlp.experts.{e}", hidden, width)
    return shapes
