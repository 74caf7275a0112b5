"""Presets change only when someone means it: every resolved field is committed."""

import pytest

from configs.presets import GOLDEN, PRESETS, preset, resolved
from configs.schema import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_golden(name):
    """After an intended change: `python -m configs.presets`."""
    assert preset(name).checked() and resolved(name) == (GOLDEN / f"{name}.json").read_text()


def test_no_stray_golden_files():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(PRESETS)


def test_nearest_name():
    with pytest.raises(ConfigError, match="did you mean kimi_k2_thinking"):
        preset("kimi_k2_thinkin")
