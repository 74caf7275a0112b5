"""Structure of a directory: JSON files, the index, which tensors there are and whether they fit together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quant.family import Family, expected_tensors
from quant.findings import Report
from quant.pack import PER_WORD
from quant.packed import PARTS
from quant.tensor_file import Checkpoint
from quant.verify_config import quantization_section, stated_group

INDEX = "model.safetensors.index.json"

LINEAR_ENDINGS = ("_proj.weight", "_proj_with_mqa.weight", "lm_head.weight")
"""Modules that loaders build as `Linear` in every model of this kind, and therefore look up in the ignore list."""


def load_json(path: Path, report: Report) -> dict[str, Any] | None:
    """The object in a JSON file, or None with an error in the report."""
    if not path.exists():
        report.error("files", f"{path.name} is missing; every loader reads it first")
        return None
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        report.error("files", f"{path.name} cannot be opened ({error.strerror}); restore it")
        return None
    except (ValueError, RecursionError) as error:
        report.error("files", f"{path.name} is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        report.error("files", f"{path.name} holds a {type(content).__name__}, not an object")
        return None
    return content


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """The index against the headers of the files: names, places, total bytes."""
    path = checkpoint.directory / INDEX
    if not path.exists() and len(set(checkpoint.files.values())) == 1:
        return
    index = load_json(path, report)
    if index is None:
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        report.error("index", f"{path.name} holds no weight_map of names to files; fetch it again")
        return
    for name, file in weight_map.items():
        if not (checkpoint.directory / file).exists():
            report.error("index", f"{name} should lie in {file}, which does not exist; fetch that file")
        elif name not in checkpoint:
            report.error("index", f"{name} is in the index but in no file; the checkpoint is incomplete")
        elif checkpoint.files[name] != file:
            report.error("index", f"{name} lies in {checkpoint.files[name]}, but the index says {file}")
    for name in sorted(checkpoint.tensors.keys() - weight_map.keys()):
        report.error("index", f"{name} is in {checkpoint.files[name]} but not in the index; loaders will not see it")
    total = sum(entry.size for entry in checkpoint.tensors.values())
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        report.warn("index", f"metadata.total_size is {stated}, but the tensors hold {total} bytes")
    for stem in sorted({name.rpartition(".")[0] for name in weight_map if name.endswith(".weight_packed")}):
        if len({weight_map.get(f"{stem}.{part}") for part in PARTS}) > 1:
            report.warn("index", f"the parts of {stem} lie in different files; some importers need them in one")


def check_tensors(checkpoint: Checkpoint, config: dict[str, Any], report: Report) -> None:
    """The three parts of every packed projection, the ignore list, and the family's names and shapes."""
    section, group = quantization_section(config), stated_group(config)
    stems = {n.rpartition(".")[0] for n in checkpoint.tensors if n.rpartition(".")[2] in PARTS}
    for stem in sorted(stems):
        _check_parts(checkpoint, stem, group, report)
    if stems and not section:
        report.error("config", f"{len(stems)} projections are packed, but config.json says nothing of it: loaders drop them")
    _check_ignore(checkpoint, stems, section.get("ignore") or [], report)
    family = Family.of(config)
    if family is None:
        kind = config.get("model_type")
        report.add(
            "not checkable",
            "names",
            f"model_type {kind!r} is not of the DeepSeek-V3 family: which tensors it needs is not known here",
        )
    else:
        _check_names(checkpoint, stems, family, report)


def _check_parts(checkpoint: Checkpoint, stem: str, group: int | None, report: Report) -> None:
    missing = [p for p in PARTS if f"{stem}.{p}" not in checkpoint]
    if missing:
        report.error("parts", f"{stem} lacks {', '.join(missing)}: it cannot be unpacked")
        return
    words, scale, shape = (checkpoint.tensors[f"{stem}.{p}"] for p in PARTS)
    if words.dtype != "I32":
        report.error("dtype", f"{stem}.weight_packed is {words.dtype}, packed words are I32")
        return
    if scale.dtype != "BF16":
        report.error(
            "dtype",
            f"{stem}.weight_scale is {scale.dtype}: the format has BF16, and a wider scale gives "
            "other weights than a bf16 reader gets",
        )
    if shape.dtype not in ("I32", "I64") or shape.shape != (2,):
        report.error("dtype", f"{stem}.weight_shape is {shape.dtype} {list(shape.shape)}, not two integers")
        return
    if len(words.shape) != 2 or len(scale.shape) != 2:
        report.error("shape", f"{stem}: words {list(words.shape)}, scales {list(scale.shape)}; both must be matrices")
        return
    out, inputs = words.shape[0], words.shape[1] * PER_WORD
    stated = checkpoint.read(f"{stem}.weight_shape").tolist()
    if stated != [out, inputs]:
        report.error(
            "shape",
            f"{stem}.weight_shape says {stated}, the words hold {[out, inputs]}; transformers "
            "believes the former without complaint",
        )
    if group and group > 0 and (inputs % group or scale.shape != (out, inputs // group)):
        report.error(
            "shape",
            f"{stem}.weight_scale is {list(scale.shape)}; {inputs} inputs in groups of {group} need {[out, inputs // group]}",
        )


def _check_ignore(checkpoint: Checkpoint, stems: set[str], ignore: Any, report: Report) -> None:
    """Loaders decide from the ignore list alone what is packed; it must agree with the files for every linear."""
    if not isinstance(ignore, list) or not all(isinstance(rule, str) for rule in ignore):
        report.error("ignore list", f"ignore is {ignore!r}, not a list of names and patterns; no loader reads that")
        return
    if not stems:
        return
    patterns = []
    for rule in ignore:
        try:
            patterns.append((rule, re.compile(rule[3:]) if rule.startswith("re:") else None))
        except re.error as error:
            report.error("ignore list", f"{rule!r} is no regular expression ({error}); loaders stop at it")

    def ignored(module: str) -> bool:
        return any(p.match(module) if p else rule == module for rule, p in patterns)

    for stem in sorted(stems):
        if ignored(stem):
            report.error("ignore list", f"{stem} is packed but matched by the ignore list: loaders look for plain weights")
    for name in sorted(n for n in checkpoint.tensors if n.endswith(LINEAR_ENDINGS)):
        module = name.removesuffix(".weight")
        if not ignored(module):
            report.error("ignore list", f"{module} is stored plain but not in the ignore list: loaders look for packed weights")


def _check_names(checkpoint: Checkpoint, stems: set[str], family: Family, report: Report) -> None:
    if family.missing:
        report.error("config", f"config.json lacks {', '.join(family.missing)}: the network is not defined")
    for name in family.misstated:
        report.error("config", f"{name} is {family.text_config[name]!r}, not a size: the network is not defined")
    if family.missing or family.misstated:
        return
    known: set[str] = set()
    for name, want in expected_tensors(family).items():
        stem = name.removesuffix(".weight")
        known |= {f"{stem}.{p}" for p in PARTS} if stem in stems else {name}
        have = _unpacked_shape(checkpoint, stem if stem in stems else name)
        if have is None:
            report.error("names", f"{name} is missing; transformers would fill it with random numbers")
        elif have != want:
            report.error("shape", f"{name} is {list(have)}, config.json implies {list(want)}")
    unknown = sorted(checkpoint.tensors.keys() - known)
    for name in unknown:
        if not family.is_extra(name):
            report.error("names", f"{name} is no tensor of this network: loaders drop it")
    extra = [checkpoint.tensors[name].size for name in unknown if family.is_extra(name)]
    if extra:
        report.note(
            "names",
            f"{len(extra)} tensors ({sum(extra):,} bytes) of multi-token prediction or of towers "
            "around the language model are not checked",
        )


def _unpacked_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    """Shape of a plain tensor, or of a packed module's weight; None where it is missing."""
    if name in checkpoint:
        return checkpoint.shape(name)
    words = f"{name}.weight_packed"
    if words not in checkpoint or len(checkpoint.shape(words)) != 2:
        return None
    out, width = checkpoint.shape(words)
    return out, width * PER_WORD
