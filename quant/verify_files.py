"""Structure of a directory: config.json, the index, which tensors there are, and what engines demand of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from quant.family import Family, expected_tensors
from quant.findings import Report
from quant.pack import PER_WORD
from quant.packed import PARTS
from quant.tensor_file import DTYPES, Checkpoint

INDEX = "model.safetensors.index.json"


def load_json(path: Path, report: Report) -> dict[str, Any] | None:
    """The object in a JSON file, or None with an error in the report."""
    if not path.exists():
        report.add("error", "files", f"{path.name} is missing; every loader reads it first")
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        report.add("error", "files", f"{path.name} is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        report.add("error", "files", f"{path.name} holds a {type(content).__name__}, not an object")
        return None
    return content


def load_config(directory: Path, report: Report) -> dict[str, Any] | None:
    return load_json(directory / "config.json", report)


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """The index against the headers of the files: names, places, total bytes."""
    path = checkpoint.directory / INDEX
    if not path.exists() and len(set(checkpoint.files.values())) == 1:
        return
    index = load_json(path, report)
    if index is None:
        return
    weight_map = index.get("weight_map", {})
    for name, file in weight_map.items():
        if not (checkpoint.directory / file).exists():
            report.add("error", "index", f"{name} should lie in {file}, which does not exist; fetch that file")
        elif name not in checkpoint:
            report.add("error", "index", f"{name} is in the index but in no file; the checkpoint is incomplete")
        elif checkpoint.files[name] != file:
            report.add("error", "index", f"{name} lies in {checkpoint.files[name]}, but the index says {file}")
    for name in checkpoint.tensors.keys() - weight_map.keys():
        report.add(
            "error", "index", f"{name} is in {checkpoint.files[name]} but not in the index; loaders will not see it"
        )
    total = sum(entry.size for entry in checkpoint.tensors.values())
    stated = index.get("metadata", {}).get("total_size")
    if stated != total:
        report.add("warning", "index", f"metadata.total_size is {stated}, but the tensors hold {total} bytes")
    for stem in {name.rpartition(".")[0] for name in weight_map if name.endswith(".weight_packed")}:
        if len({weight_map.get(f"{stem}.{part}") for part in PARTS}) > 1:
            report.add(
                "warning", "index", f"the parts of {stem} lie in different files; some importers need them in one"
            )


def check_config(config: dict[str, Any], report: Report) -> None:
    """What config.json promises about the model and the format."""
    if config.get("model_type") == "kimi_k2":
        report.add(
            "warning",
            "config",
            "model_type kimi_k2: transformers without remote code loads random experts and only "
            "warns; deepseek_v3 is the same network",
        )
    _check_quantization(config, report)
    family = Family.of(config)
    if family is not None:
        _check_readers(family.text_config, report)


def _check_quantization(config: dict[str, Any], report: Report) -> None:
    section = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if section is None:
        report.add("note", "config", "no quantization_config: the weights are plain")
        return
    if section.get("quant_method") != "compressed-tensors":
        report.add(
            "error",
            "config",
            f"quant_method is {section.get('quant_method')!r}; only compressed-tensors is checked here",
        )
        return
    if section.get("format") != "pack-quantized":
        report.add("error", "config", f"format is {section.get('format')!r} at the top level, where SGLang looks for "
                   "pack-quantized")
    if section.get("quantization_status") != "compressed":
        report.add("error", "config", f"quantization_status is {section.get('quantization_status')!r}; loaders expect "
                   "compressed files")
    groups = section.get("config_groups", {})
    for label, group in groups.items():
        weights = group.get("weights") or {}
        for key, want in (("num_bits", 4), ("type", "int"), ("symmetric", True), ("strategy", "group")):
            if weights.get(key) != want:
                report.add(
                    "error",
                    "config",
                    f"{label}.weights.{key} is {weights.get(key)!r}, the packed words need {want!r}; "
                    "transformers believes the config and decodes wrong weights",
                )
        if weights.get("actorder"):
            report.add("error", "config", f"{label}.weights.actorder is set, but no order of groups is stored")
        if group.get("targets") != ["Linear"]:
            report.add(
                "warning",
                "config",
                f'{label}.targets is {group.get("targets")}; SGLang finds its scheme only under ["Linear"]',
            )
    if not groups:
        report.add("error", "config", "quantization_config has no config_groups")


def _check_readers(text: dict[str, Any], report: Report) -> None:
    """Fields that one reader takes for granted and another does not."""
    if "scoring_func" not in text:
        report.add("warning", "config", 'scoring_func is missing: llama.cpp then takes softmax instead of "sigmoid"')
    if text.get("num_nextn_predict_layers") is None:
        report.add("warning", "config", "num_nextn_predict_layers is missing: transformers assumes 1")
    if text.get("q_lora_rank") is None and text.get("num_hidden_layers") not in (26, 27):
        report.add("warning", "config", "q_lora_rank is null: llama.cpp accepts that for 26 or 27 layers only")
    if text.get("rms_norm_eps") != 1e-6:
        report.add(
            "note",
            "config",
            f"rms_norm_eps is {text.get('rms_norm_eps')}: transformers uses 1e-6 in the latent norms, "
            "llama.cpp uses this value there",
        )
    rope = text.get("rope_scaling") or {}
    if rope.get("type", rope.get("rope_type")) == "yarn":
        if rope.get("beta_fast") != 32:
            report.add("warning", "config", f"YaRN beta_fast is {rope.get('beta_fast')}: llama.cpp uses 32 unless told "
                       "--yarn-beta-fast")
        if rope.get("mscale") != rope.get("mscale_all_dim") or not rope.get("mscale"):
            report.add(
                "warning",
                "config",
                "YaRN mscale and mscale_all_dim differ or are 0: llama.cpp computes another function",
            )
    hidden, expert = text.get("hidden_size", 0), text.get("moe_intermediate_size", 0)
    if hidden % 128 or expert % 128:
        report.add(
            "warning",
            "engine limits",
            f"hidden_size {hidden} and moe_intermediate_size {expert} should be multiples of "
            "128: the Marlin kernels of vLLM and SGLang refuse others or fall back to slow ones",
        )


def check_tensors(checkpoint: Checkpoint, config: dict[str, Any], report: Report) -> None:
    """The three parts of every packed projection, the ignore list, and the family's names and shapes."""
    section = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}
    groups = [g.get("weights") or {} for g in section.get("config_groups", {}).values()]
    group = groups[0].get("group_size") if groups else None
    stems = {n.rpartition(".")[0] for n in checkpoint.tensors if n.rpartition(".")[2] in PARTS}
    for stem in sorted(stems):
        _check_parts(checkpoint, stem, group, report)
    if stems and not groups:
        report.add(
            "error",
            "config",
            f"{len(stems)} projections are packed, but config.json says nothing of it: loaders drop them",
        )
    _check_ignore(checkpoint, stems, section.get("ignore", []), report)
    if group is not None and group not in (32, 64, 128, -1):
        report.add("warning", "engine limits", f"group_size {group}: vLLM's Marlin kernel takes 32, 64 or 128")
    family = Family.of(config)
    if family is None:
        report.add(
            "not checkable",
            "names",
            f"model_type {config.get('model_type')!r} is not of the DeepSeek-V3 family: which "
            "tensors it needs is not known here",
        )
    else:
        _check_names(checkpoint, stems, family, report)


def _check_parts(checkpoint: Checkpoint, stem: str, group: int | None, report: Report) -> None:
    missing = [p for p in PARTS if f"{stem}.{p}" not in checkpoint]
    if missing:
        report.add("error", "parts", f"{stem} lacks {', '.join(missing)}: it cannot be unpacked")
        return
    words, scale, shape = (checkpoint.tensors[f"{stem}.{p}"] for p in PARTS)
    if words.dtype != "I32":
        report.add("error", "dtype", f"{stem}.weight_packed is {words.dtype}, packed words are I32")
        return
    if scale.dtype != "BF16":
        report.add(
            "error",
            "dtype",
            f"{stem}.weight_scale is {scale.dtype}: Kimi's format has BF16, and a wider scale gives "
            "other weights than a bf16 reader gets",
        )
    if shape.dtype not in ("I32", "I64") or shape.shape != (2,):
        report.add("error", "dtype", f"{stem}.weight_shape is {shape.dtype} {list(shape.shape)}, not two integers")
        return
    if len(words.shape) != 2 or len(scale.shape) != 2:
        report.add(
            "error", "shape", f"{stem}: words {list(words.shape)} and scales {list(scale.shape)} must both be matrices"
        )
        return
    out, inputs = words.shape[0], words.shape[1] * PER_WORD
    stated = checkpoint.read(f"{stem}.weight_shape").tolist()
    if stated != [out, inputs]:
        report.add(
            "error",
            "shape",
            f"{stem}.weight_shape says {stated}, the words hold {[out, inputs]}; transformers believes "
            "the former without complaint",
        )
    if group and group > 0 and (inputs % group or scale.shape != (out, inputs // group)):
        report.add(
            "error",
            "shape",
            f"{stem}.weight_scale is {list(scale.shape)}; {inputs} inputs in groups of {group} need "
            f"{[out, inputs // group]}",
        )


def _check_ignore(checkpoint: Checkpoint, stems: set[str], ignore: list[str], report: Report) -> None:
    """Loaders decide from the ignore list alone what is packed; it must agree with the files for every linear."""
    if not stems:
        return
    patterns = [(rule, re.compile(rule[3:]) if rule.startswith("re:") else None) for rule in ignore]

    def ignored(module: str) -> bool:
        return any(p.match(module) if p else rule == module for rule, p in patterns)

    for stem in sorted(stems):
        if ignored(stem):
            report.add(
                "error",
                "ignore list",
                f"{stem} is packed but matched by the ignore list: loaders look for plain weights",
            )
    for name in sorted(checkpoint.tensors):
        module = name.removesuffix(".weight")
        is_linear = name.endswith(("_proj.weight", "_proj_with_mqa.weight", "lm_head.weight"))
        if is_linear and not ignored(module):
            report.add(
                "error",
                "ignore list",
                f"{module} is stored plain but not in the ignore list: loaders look for packed weights",
            )


def _check_names(checkpoint: Checkpoint, stems: set[str], family: Family, report: Report) -> None:
    expected = expected_tensors(family)
    if not expected:
        report.add("error", "config", f"config.json lacks {', '.join(family.missing)}: the network is not defined")
        return
    known = set()
    for name, want in expected.items():
        stem = name.removesuffix(".weight")
        if stem in stems:
            known |= {f"{stem}.{p}" for p in PARTS}
            words = checkpoint.tensors.get(f"{stem}.weight_packed")
            if words and len(words.shape) == 2 and (words.shape[0], words.shape[1] * PER_WORD) != want:
                report.add(
                    "error",
                    "shape",
                    f"{stem} is {[words.shape[0], words.shape[1] * PER_WORD]}, config.json implies {list(want)}",
                )
            continue
        known.add(name)
        if name not in checkpoint:
            report.add("error", "names", f"{name} is missing; transformers would fill it with random numbers")
        elif checkpoint.shape(name) != want:
            report.add("error", "shape", f"{name} is {list(checkpoint.shape(name))}, config.json implies {list(want)}")
    for name in sorted(checkpoint.tensors.keys() - known):
        if family.is_extra(name):
            continue
        report.add("error", "names", f"{name} is no tensor of this network: loaders drop it")
    mtp = sum(
        math.prod(e.shape) * DTYPES[e.dtype].itemsize for n, e in checkpoint.tensors.items() if family.is_extra(n)
    )
    if mtp:
        report.add("note", "names", f"{mtp:,} bytes of multi-token-prediction or vision weights are not checked")
