"""config.json of a DeepSeek-V3-family checkpoint -> ModelConfig and QuantConfig.

Every key must be understood. One that is neither a field of ours, nor fixed by the family, nor known to be harmless
may change the mathematics, and stops the import with its name. Old and new spellings of the rope fields are both read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from configs.schema import ConfigError, ModelConfig, QuantConfig, require
from quant.family import MODEL_TYPES
from quant.hf_config import FIXED, HARMLESS, ROPE_SCALING, SAME_NAME

OPTIONAL = {"initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1}
"""Fields of ours that a forward pass does not need, and what transformers takes where a file has none."""

SILENT = set(HARMLESS) | {
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
    "max_length",
    "output_router_logits",
    "_name_or_path",
    "tokenizer_class",
    "pad_token_id",
    # What transformers 4 wrote into every config inside another one: of generation, of classifiers, of its own outputs.
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "finetuning_task",
    "id2label",
    "label2id",
    "length_penalty",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "tf_legacy_loss",
    "top_k",
    "top_p",
    "typical_p",
}
"""Keys read elsewhere, or without influence on a forward pass."""

KINDS = {
    int: ("a whole number", int),
    bool: ("true or false", bool),
    float: ("a finite 64-bit number", (int, float)),
    str: ("a text", str),
    dict: ("an object", dict),
}
"""Types of fields, in words, and what JSON has for them."""


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
    require(path.is_file(), f"{path} is missing; an import needs the directory of a Hugging Face checkpoint")
    config = _json(path)
    notes: list[str] = []
    text, prefix = config, ""
    if isinstance(config.get("text_config"), dict):
        text, prefix = config["text_config"], "language_model."
        text.setdefault("quantization_config", config.get("quantization_config"))
        notes.append("only the language model is imported, not the towers around it")
    require(
        text.get("model_type") in MODEL_TYPES,
        f"{path.name} describes model_type {text.get('model_type')!r}; only the "
        f"DeepSeek-V3 family ({', '.join(MODEL_TYPES)}) is read",
    )
    _refuse_other_mathematics(text)
    if text.get("num_nextn_predict_layers"):
        notes.append(
            f"{text['num_nextn_predict_layers']} multi-token-prediction layers are skipped: they are not part of the "
            "language model"
        )
    model = ModelConfig(
        **_same_names(text), **_stops(text, path.with_name("generation_config.json")), **_rope(text), dtype=_dtype(text)
    )
    return ReadConfig(model, _quantization(text.get("quantization_config")), prefix, tuple(notes))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    require(isinstance(content, dict), f"{path} holds no JSON object")
    return content


def _typed(key: str, value: Any, kind: type) -> Any:
    """The value, if JSON's type is the field's; true is no number, and neither is what no finite float holds."""
    words, types = KINDS[kind]
    fits = isinstance(value, types) and isinstance(value, bool) == (kind is bool)
    require(
        fits and (kind is not float or abs(value) <= sys.float_info.max), f"config.json: {key} is {value!r}, which is not {words}"
    )
    return value


def _refuse_other_mathematics(text: dict[str, Any]) -> None:
    for key, want in FIXED.items():
        require(text.get(key, want) == want, f"config.json: {key} is {text.get(key)!r}, but this network computes {want!r}")
    require(
        text.get("rope_interleave", True) is True,
        "config.json: rope_interleave is false, but this network rotates interleaved pairs",
    )
    heads = text.get("num_attention_heads")
    require(
        text.get("num_key_value_heads", heads) == heads,
        "config.json: num_key_value_heads differs from num_attention_heads; latent attention has no grouped queries",
    )
    known = SILENT | set(SAME_NAME) | set(FIXED) | {"rope_interleave"}
    for key, value in text.items():
        require(
            key in known or not value,
            f"config.json: {key} = {value!r} is not known here and may change the mathematics; remove it if it does not",
        )


def _same_names(text: dict[str, Any]) -> dict[str, Any]:
    kinds, values = get_type_hints(ModelConfig), {}
    for key in set(SAME_NAME) - {"rope_theta", "eos_token_id", "pad_token_id"}:
        value = text.get(key, OPTIONAL.get(key))
        require(key in text or key in OPTIONAL, f"config.json lacks {key}, without which the network is not defined")
        if key == "q_lora_rank":
            values[key] = None if value is None else _typed(key, value, int)
        else:
            values[key] = _typed(key, OPTIONAL.get(key) if value is None else value, kinds[key])
    return values


def _stops(text: dict[str, Any], generation: Path) -> dict[str, Any]:
    """All ids at which a reply ends, config.json's before those that generation_config.json adds, and the padding."""
    stops: list[int] = []
    for config in (text, _json(generation) if generation.is_file() else {}):
        ids = config.get("eos_token_id")
        stops += [_typed("eos_token_id", i, int) for i in (ids if isinstance(ids, list) else [] if ids is None else [ids])]
    stops = list(dict.fromkeys(stops)) or [OPTIONAL["eos_token_id"]]
    pad = text.get("pad_token_id")
    return {
        "eos_token_id": stops[0],
        "stop_token_ids": tuple(stops[1:]),
        "pad_token_id": stops[0] if pad is None else _typed("pad_token_id", pad, int),
    }


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and YaRN's fields, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    rope, old = (dict(_typed(key, text.get(key) or {}, dict)) for key in ("rope_parameters", "rope_scaling"))
    theta = rope.pop("rope_theta", text.get("rope_theta"))
    rope = {key: value for key, value in (rope or old).items() if value is not None}
    require(theta is not None, "config.json lacks rope_theta, at the top level and in rope_parameters")
    theta = float(_typed("rope_theta", theta, float))
    kinds = {_typed(f"rope_scaling.{key}", rope.pop(key), str) for key in ("type", "rope_type") if key in rope} or {"default"}
    if kinds == {"default"}:
        require(not rope, f"config.json: rope fields {sorted(rope)} without a rope type are not known here")
        return {"rope_theta": theta}
    require(kinds == {"yarn"}, f"config.json: rope type {' / '.join(sorted(kinds))} is not computed here; yarn is")
    unknown = sorted(rope.keys() - ROPE_SCALING.keys())
    require(not unknown, f"config.json: rope_scaling.{(unknown or [''])[0]} is not known here and changes the positions")
    for key in ("factor", "original_max_position_embeddings"):
        require(key in rope, f"config.json: YaRN without rope_scaling.{key}")
    # Absent multipliers mean 0.1 ln(factor) + 1 on the cosines and an unchanged softmax scale: mscale 1 over 0.
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    values = {key: float(_typed(f"rope_scaling.{key}", value, float)) for key, value in (defaults | rope).items()}
    require(
        values["mscale_all_dim"] != 0 or values["mscale"] == 1,
        "config.json: rope_scaling.mscale without mscale_all_dim is read differently by different programs",
    )
    ours = {field: values[key] for key, field in ROPE_SCALING.items()}
    return {"rope_theta": theta, **ours, "yarn_original_positions": int(values["original_max_position_embeddings"])}


def _dtype(text: dict[str, Any]) -> str:
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    require(
        dtype in ("bfloat16", "float32"), f"config.json: weights of {dtype} are not read; convert them to bfloat16 or float32"
    )
    return dtype


def _quantization(section: dict[str, Any] | None) -> QuantConfig:
    if not section:
        return QuantConfig(grid="none")
    method = _typed("quantization_config", section, dict).get("quant_method")
    require(
        method != "fp8",
        "config.json: the weights are stored in fp8, which is not read; convert them to bf16 first, as "
        "DeepSeek's fp8_cast_bf16.py does, and remove quantization_config",
    )
    require(
        (method, section.get("format")) == ("compressed-tensors", "pack-quantized"),
        f"config.json: quantisation {method!r} / {section.get('format')!r} is not read; compressed-tensors pack-quantized "
        "INT4 is, and so are bf16 and f32",
    )
    groups = list(_typed("quantization_config.config_groups", section.get("config_groups"), dict).values())
    group = groups[0] if len(groups) == 1 and isinstance(groups[0], dict) else {}
    weights = group.get("weights") if isinstance(group.get("weights"), dict) else {}
    want = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    require(
        all(weights.get(key) == value for key, value in want.items()) and not weights.get("actorder"),
        "config.json: quantization_config must hold one group of symmetric 4-bit integers without reordering",
    )
    require(
        not group.get("input_activations") and not group.get("output_activations"),
        "config.json: quantization_config rounds activations too, which this network does not",
    )
    return QuantConfig(grid="int4", group_size=_typed("group_size", weights.get("group_size"), int))
