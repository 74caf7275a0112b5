"""The presets by name. `python -m configs.presets` writes the golden files that tests/model/test_presets.py compares."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path

from configs.deepseek_v3 import deepseek_v3
from configs.kimi_k2 import kimi_k2, kimi_k2_thinking
from configs.moonlight import moonlight_16b
from configs.plans import PLANS
from configs.schema import ConfigError, RunConfig
from configs.tiny import laptop, one_gpu, tiny, tiny_sft

PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f for f in (tiny, tiny_sft, laptop, one_gpu, kimi_k2, kimi_k2_thinking, deepseek_v3, moonlight_16b)
} | PLANS

GOLDEN = Path(__file__).parent / "golden"


def preset(name: str) -> RunConfig:
    """The configuration of a preset; ConfigError with the nearest name for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}known presets: {', '.join(PRESETS)}")
    return PRESETS[name]()


def resolved(name: str) -> str:
    """Every field of a preset as JSON: what a golden file holds."""
    return json.dumps(dataclasses.asdict(preset(name)), indent=2) + "\n"


if __name__ == "__main__":
    for name in PRESETS:
        (GOLDEN / f"{name}.json").write_text(resolved(name))
