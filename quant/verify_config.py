"""What config.json promises about the format and the network, and which readers understand it otherwise."""

from __future__ import annotations

from typing import Any

from quant.family import Family
from quant.findings import Report


def _object(value: Any) -> dict[str, Any]:
    """A value of some config.json that should be an object, as one; `_need_object` reports where it is something else."""
    return value if isinstance(value, dict) else {}


def _need_object(value: Any, name: str, report: Report) -> None:
    if value is not None and not isinstance(value, dict):
        report.error("config", f"{name} is {value!r}, not an object; no loader reads that")


def _stated_section(config: dict[str, Any]) -> Any:
    return config.get("quantization_config") or _object(config.get("text_config")).get("quantization_config")


def quantization_section(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config, at the top level or of a wrapped language model; empty where there is none."""
    return _object(_stated_section(config))


def stated_group(config: dict[str, Any]) -> int | None:
    """The group size that config.json states, or None."""
    groups = _object(quantization_section(config).get("config_groups"))
    size = _object(_object(next(iter(groups.values()), None)).get("weights")).get("group_size")
    return size if type(size) is int else None


def check_config(config: dict[str, Any], report: Report) -> None:
    """All of config.json that can be judged without the tensors."""
    if config.get("model_type") == "kimi_k2":
        report.warn(
            "config",
            "model_type kimi_k2: transformers without remote code loads random experts and only "
            "warns; deepseek_v3 is the same network",
        )
    section = _stated_section(config)
    _need_object(section, "quantization_config", report)
    if not section:
        report.note("config", "no quantization_config: the weights are plain")
    elif isinstance(section, dict):
        _check_format(section, report)
    family = Family.of(config)
    if family is not None:
        _check_readers(family.text_config, report)
        if not family.misstated:
            _check_widths(family.text_config, stated_group(config), report)


def _check_format(section: dict[str, Any], report: Report) -> None:
    method, form, status = (section.get(key) for key in ("quant_method", "format", "quantization_status"))
    if method != "compressed-tensors":
        report.error("config", f"quant_method is {method!r}; only compressed-tensors is checked here")
        return
    if form != "pack-quantized":
        report.error("config", f"format is {form!r} at the top level, where SGLang looks for pack-quantized")
    if status != "compressed":
        report.error("config", f"quantization_status is {status!r}; loaders expect compressed files")
    groups = section.get("config_groups")
    _need_object(groups, "config_groups", report)
    if not groups:
        report.error("config", "quantization_config has no config_groups")
    for label, group in _object(groups).items():
        _need_object(group, label, report)
        _check_group(label, _object(group), report)


def _check_group(label: str, group: dict[str, Any], report: Report) -> None:
    _need_object(group.get("weights"), f"{label}.weights", report)
    weights = _object(group.get("weights"))
    for key, want in (("num_bits", 4), ("type", "int"), ("symmetric", True), ("strategy", "group")):
        if weights.get(key) != want:
            report.error(
                "config",
                f"{label}.weights.{key} is {weights.get(key)!r}, the packed words need {want!r}; "
                "transformers believes the config and decodes wrong weights",
            )
    if type(weights.get("group_size")) is not int:
        report.error("config", f"{label}.weights.group_size is {weights.get('group_size')!r}, not a whole number")
    if weights.get("actorder"):
        report.error("config", f"{label}.weights.actorder is set, but no order of groups is stored")
    if group.get("targets") != ["Linear"]:
        report.warn("config", f'{label}.targets is {group.get("targets")}; SGLang finds its scheme only under ["Linear"]')


def _check_readers(text: dict[str, Any], report: Report) -> None:
    """Fields that one reader takes for granted and another does not."""
    if "scoring_func" not in text:
        report.warn("config", 'scoring_func is missing: llama.cpp then takes softmax instead of "sigmoid"')
    if text.get("num_nextn_predict_layers") is None:
        report.warn("config", "num_nextn_predict_layers is missing: transformers assumes 1")
    if text.get("q_lora_rank") is None and text.get("num_hidden_layers") not in (26, 27):
        report.warn("config", "q_lora_rank is null: llama.cpp accepts that for 26 or 27 layers only")
    eps = text.get("rms_norm_eps")
    if eps != 1e-6:
        report.note("config", f"rms_norm_eps is {eps}: transformers uses 1e-6 in the latent norms, llama.cpp {eps}")
    for key in ("rope_parameters", "rope_scaling"):
        _need_object(text.get(key), key, report)
    rope = _object(text.get("rope_parameters")) or _object(text.get("rope_scaling"))
    if rope.get("type", rope.get("rope_type")) != "yarn":
        return
    if rope.get("beta_fast") != 32:
        report.warn("config", f"YaRN beta_fast is {rope.get('beta_fast')}: llama.cpp uses 32 unless told --yarn-beta-fast")
    if rope.get("mscale") != rope.get("mscale_all_dim") or not rope.get("mscale"):
        report.warn("config", "YaRN mscale and mscale_all_dim differ or are 0: llama.cpp computes another function")


def _check_widths(text: dict[str, Any], group: int | None, report: Report) -> None:
    """What INT4 kernels demand."""
    hidden, expert = text.get("hidden_size", 0), text.get("moe_intermediate_size", 0)
    if group is None:
        return
    if group not in (32, 64, 128, -1):
        report.warn("engine limits", f"group_size {group}: vLLM's Marlin kernel takes 32, 64 or 128")
    if hidden % 128 or expert % 128:
        report.warn(
            "engine limits",
            f"hidden_size {hidden} and moe_intermediate_size {expert} should be multiples of "
            "128: the Marlin kernels of vLLM and SGLang refuse others or fall back to slow ones",
        )
    whole = [str(n) for n in (1, 2, 4, 8, 16, 32) if expert and expert % (n * max(64, group)) == 0]
    report.note(
        "engine limits",
        f"tensor parallelism over {', '.join(whole) or 'no number of'} devices keeps the groups of down_proj whole",
    )
