"""config.json of a DeepSeek-V3-family checkpoint -> ModelConfig and QuantConfig.

Every key must be understood. One that is neither a field of ours, nor fixed by the family, nor known to be harmless
may change the mathematics, and stops the import with its name. Old and new spellings of the rope fields are both read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, ModelConfig, QuantConfig
from quant.family import MODEL_TYPES
from quant.hf_config import FIXED, HARMLESS, ROPE_SCALING, SAME_NAME

OPTIONAL = {"initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
"""Fields of ours that a forward pass does not need, and what stands in for them."""

SILENT = set(HARMLESS) | {
    "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype", "quantization_config",
    "rope_theta", "rope_scaling", "rope_parameters", "num_key_value_heads", "head_dim", "qk_head_dim", "max_length",
    "output_router_logits", "_name_or_path", "tokenizer_class",
}
"""Keys read elsewhere, or without influence on a forward pass."""


@dataclass(frozen=True)
class ReadConfig:
    """A directory's config. `prefix` stands before every tensor name; `notes` are sentences for the user."""

    model: ModelConfig
    quant: QuantConfig
    prefix: str
    notes: tuple[str, ...]


def read_config(directory: str | Path) -> ReadConfig:
    """Read `directory/config.json`; raises ConfigError where a reader of ours would compute another function."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; an import needs the directory of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    notes: list[str] = []
    text, prefix = config, ""
    if isinstance(config.get("text_config"), dict):
        text, prefix = config["text_config"], "language_model."
        text.setdefault("quantization_config", config.get("quantization_config"))
        notes.append("only the language model is imported, not the towers around it")
    if text.get("model_type") not in MODEL_TYPES:
        raise ConfigError(f"{path.name} describes model_type {text.get('model_type')!r}; only the DeepSeek-V3 family "
                          f"({', '.join(MODEL_TYPES)}) is read")
    _refuse_other_mathematics(text)
    model = ModelConfig(**_same_names(text, notes), **_rope(text), dtype=_dtype(text))
    return ReadConfig(model, _quantization(text.get("quantization_config")), prefix, tuple(notes))


def _refuse_other_mathematics(text: dict[str, Any]) -> None:
    for key, want in FIXED.items():
        if text.get(key, want) != want:
            raise ConfigError(f"config.json: {key} is {text[key]!r}, but this network computes {want!r}")
    if text.get("rope_interleave", True) is not True:
        raise ConfigError("config.json: rope_interleave is false, but this network rotates interleaved pairs")
    heads = text.get("num_attention_heads")
    if text.get("num_key_value_heads", heads) != heads:
        raise ConfigError("config.json: num_key_value_heads differs from num_attention_heads; latent attention has no "
                          "grouped queries")
    known = SILENT | set(SAME_NAME) | set(FIXED) | {"rope_interleave"}
    for key, value in text.items():
        if key not in known and value not in (None, False, 0):
            raise ConfigError(
                f"config.json: {key} = {value!r} is not known here and may change the mathematics; remove it if "
                "it does not"
            )


def _same_names(text: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    values = {}
    for key in SAME_NAME:
        if key == "rope_theta":
            continue
        if key not in text and key not in OPTIONAL:
            raise ConfigError(f"config.json lacks {key}, without which the network is not defined")
        values[key] = text.get(key, OPTIONAL.get(key))
        if not isinstance(values[key], (int, float, list, type(None))):
            raise ConfigError(f"config.json: {key} is {values[key]!r}, which is no number")
    if isinstance(values["eos_token_id"], list):
        notes.append(f"of the stop tokens {values['eos_token_id']} the first is kept")
        values["eos_token_id"] = values["eos_token_id"][0]
    for key in ("bos_token_id", "eos_token_id"):
        values[key] = 0 if values[key] is None else values[key]
    if values["pad_token_id"] is None:
        values["pad_token_id"] = values["eos_token_id"]
    if text.get("num_nextn_predict_layers"):
        notes.append(
            f"{text['num_nextn_predict_layers']} multi-token-prediction layers are skipped: they are not part of the "
            "language model"
        )
    return values


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and YaRN's fields, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", text.get("rope_theta"))
    rope = rope or dict(text.get("rope_scaling") or {})
    if theta is None:
        raise ConfigError("config.json lacks rope_theta, at the top level and in rope_parameters")
    kinds = {rope.pop(key) for key in ("type", "rope_type") if key in rope} or {"default"}
    if kinds == {"default"}:
        if rope:
            raise ConfigError(f"config.json: rope fields {sorted(rope)} without a rope type are not known here")
        return {"rope_theta": float(theta)}
    if kinds != {"yarn"}:
        raise ConfigError(f"config.json: rope type {' / '.join(sorted(map(str, kinds)))} is not computed here; yarn is")
    rope = {key: value for key, value in rope.items() if value is not None}
    unknown = rope.keys() - ROPE_SCALING.keys()
    if unknown:
        raise ConfigError(f"config.json: rope_scaling.{sorted(unknown)[0]} is not known here and changes the positions")
    for key in ("factor", "original_max_position_embeddings"):
        if key not in rope:
            raise ConfigError(f"config.json: YaRN without rope_scaling.{key}")
    # Absent multipliers mean 0.1 ln(factor) + 1 on the cosines and an unchanged softmax scale: mscale 1 over 0.
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    values = defaults | rope
    if not rope.get("mscale_all_dim") and values["mscale"] != 1.0:
        raise ConfigError(
            "config.json: rope_scaling.mscale without mscale_all_dim is read differently by different programs"
        )
    ours = {field: float(values[key]) for key, field in ROPE_SCALING.items()}
    ours["yarn_original_positions"] = int(ours["yarn_original_positions"])
    return {"rope_theta": float(theta), **ours}


def _dtype(text: dict[str, Any]) -> str:
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"config.json: weights of {dtype} are not read; convert them to bfloat16 or float32")
    return dtype


def _quantization(section: dict[str, Any] | None) -> QuantConfig:
    if not section:
        return QuantConfig(grid="none")
    if section.get("quant_method") != "compressed-tensors" or section.get("format") != "pack-quantized":
        raise ConfigError(
            f"config.json: quantisation {section.get('quant_method')!r} / {section.get('format')!r} is not read; "
            "compressed-tensors pack-quantized INT4 is, and so are bf16 and f32"
        )
    groups = list(section.get("config_groups", {}).values())
    weights = groups[0].get("weights", {}) if len(groups) == 1 else {}
    want = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    if any(weights.get(key) != value for key, value in want.items()) or weights.get("actorder"):
        raise ConfigError(
            "config.json: quantization_config must hold one group of symmetric 4-bit integers without reordering"
        )
    return QuantConfig(grid="int4", group_size=weights["group_size"])
