"""What benchmarks time, and on which device; their numbers are not tests."""

import json
import runpy
import sys
import types
from pathlib import Path

import jax
import pytest

from bench import int4_roofline, measure, muon, plans, quant_table
from configs.presets import preset
from configs.schema import ModelConfig

CACHE = 50 << 20
"""Bytes of a Hopper GPU's second-level cache."""


def calls_of(monkeypatch, backend: str, milliseconds: float) -> list[int]:
    """Calls that each timing waited for, of a program that takes `milliseconds`, on a clock of its own."""
    now, sent, waited = [0.0], [0], []

    def wait(_):
        now[0] += 1e-3 * milliseconds * sent[0]
        waited.append(sent[0])
        sent[0] = 0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    best = measure.in_turns({"it": lambda: sent.__setitem__(0, sent[0] + 1)}, rounds=3)
    assert best["it"]["wall_ms"] == pytest.approx(milliseconds, abs=1e-3)
    return waited[-3:]


@pytest.mark.parametrize(
    "backend, milliseconds, calls",
    [("cpu", 0.03, 1), ("cpu", 30, 1), ("gpu", 30, 1), ("gpu", 3, 4), ("gpu", 0.03, 512), ("tpu", 0.03, 512)],
)
def test_an_accelerator_is_timed_for_long_enough(monkeypatch, backend, milliseconds, calls):
    assert calls_of(monkeypatch, backend, milliseconds) == [calls] * 3


@pytest.mark.parametrize("name", ["moonlight_16b", "kimi_k2"])
def test_layers_of_experts_exceed_a_cache_and_fit_a_device(name):
    """On an accelerator; a token reads its experts of every layer."""
    model = preset(name).model
    L, E, K = int4_roofline.sizes(model, "hopper")
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    assert L * K * expert * 4.5 / 8 > 2 * CACHE
    assert K < E <= model.n_routed_experts and 2 * L * E * expert <= int4_roofline.HELD
    assert int4_roofline.sizes(model, "cpu") == (1, 8, 2)


def test_all_layers_are_in_one_program(monkeypatch):
    """Bits per weight are counted over all of them."""
    monkeypatch.setattr(int4_roofline, "sizes", lambda model, platform: (2, 4, 2))
    monkeypatch.setattr(int4_roofline, "TOKENS", (4,))
    model = ModelConfig(hidden_size=64, moe_intermediate_size=32)
    whole, packed = int4_roofline.measured(model, "bfloat16")
    assert (whole["bits_per_weight"], packed["bits_per_weight"]) == (16, 4.5)
    assert whole["bytes_to_read"] == 2 * 2 * 3 * 64 * 32 * whole["experts_hit"]


def test_meshes_that_the_machine_lacks_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(muon, "PRESETS", ())
    monkeypatch.setattr(muon, "MESHES", ((1, 1), (4, 16)))
    assert muon.compare()["rows"] == []
    assert f"64 devices: left out, there are {jax.device_count()}" in capsys.readouterr().err


def test_the_share_is_that_of_the_device(monkeypatch):
    """Optimizer and step are compiled for it, not for a CPU."""

    class Enough(Exception):
        pass

    def step(run, dtype, platform, mesh):
        raise Enough(platform, mesh.devices.tolist())

    monkeypatch.setattr(muon, "platform_of", lambda device: "hopper")
    monkeypatch.setattr(muon, "StepConfig", step)
    monkeypatch.setattr(muon, "build_optimizer", lambda *args, mesh, shardings: types.SimpleNamespace(mesh=mesh))
    with pytest.raises(Enough) as built:
        muon.share_of("tiny", "muon", 4, 1)
    assert built.value.args[0] == "hopper" and len(jax.tree.leaves(built.value.args[1])) == 1


@pytest.mark.parametrize("code, writes", [(2, False), (1, False), (-11, True)])
def test_a_plan_that_was_not_compiled_is_named_and_not_shown(monkeypatch, capsys, tmp_path, code, writes):
    """Its old result stays where it was."""
    old = (plans.RESULTS / "kimi_k2_v5p_512.json").read_text()
    monkeypatch.setattr(plans, "RESULTS", tmp_path)
    for name in ("kimi_k2_v5p_512", "kimi_k2_tpu7x_256"):
        (tmp_path / f"{name}.json").write_text(old)

    def run(command, **_):
        if writes or "kimi_k2_v5p_512" in command:
            Path(command[-1]).write_text(old)
        return types.SimpleNamespace(returncode=1 if "kimi_k2_v5p_512" in command else code)

    monkeypatch.setattr(plans.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["plans", "kimi_k2_v5p_512", "kimi_k2_tpu7x_256"])
    with pytest.raises(SystemExit, match="not compiled.*: kimi_k2_tpu7x_256$"):
        plans.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| kimi")]
    assert len(table) == 1 and "kimi_k2_v5p_512" in table[0]
    assert json.loads((tmp_path / "kimi_k2_tpu7x_256.json").read_text()) == json.loads(old)


def test_one_seed_has_no_interval(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quant_table", "text", "--seeds", "0", "--write"])
    with pytest.raises(SystemExit):
        quant_table.main()
    assert "--write needs two seeds or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["grid_pass", "attention", "cross_entropy", "grouped_matmul", "newton_schulz", "int4_roofline", "export_memory"]
)
def test_what_a_benchmark_does_not_know_overwrites_nothing(name, monkeypatch, capsys):
    """They write their results without being asked to."""
    monkeypatch.setattr("bench.measure.write", None)
    monkeypatch.setattr("sys.argv", [name, "--hlep"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    assert stop.value.code == 2 and "--hlep" in capsys.readouterr().err
