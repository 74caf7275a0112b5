"""Closed-form counts against published totals and against the table of formulas in arXiv 2412.19437 / 2502.16982."""

import pytest

from configs.presets import PRESETS, preset
from configs.schema import QuantConfig
from model.router import gate_scale
from model.transformer import param_specs
from train import counts
from train.metrics import peak_flops

PUBLISHED = {
    "kimi_k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "kimi_k2_thinking": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "deepseek_v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "moonlight_16b": (15_960_110_208, 2_914_776_192, 2_579_231_872),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    cfg = preset(name).model
    p = counts.parameters(cfg, param_specs(cfg))
    assert (p.total, p.active, p.active_without_embed) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, seq_len, gigaflops",
    [
        ("kimi_k2", 4096, 205.5),
        ("kimi_k2", 262144, 1172.6),
        ("deepseek_v3", 4096, 250.4),
        ("deepseek_v3", 32768, 465.4),
        ("moonlight_16b", 4096, 17.2),
        ("moonlight_16b", 131072, 69.8),
    ],
)
def test_train_flops(name, seq_len, gigaflops):
    cfg = preset(name).model
    flops = counts.train_flops_per_token(cfg, param_specs(cfg), seq_len)
    assert flops / 1e9 == pytest.approx(gigaflops, abs=0.06)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_bytes():
    """K2's INT4 checkpoint is published at about 594 GB; its cache at 70 KB a token."""
    run = preset("kimi_k2_thinking")
    specs = param_specs(run.model)
    assert counts.served_bytes(run.model, specs, run.quant) == 594_205_351_936
    assert counts.served_bytes(run.model, specs, QuantConfig(grid="none")) == pytest.approx(2 * 1_026_408_232_448, rel=1e-6)
    assert counts.cache_bytes_per_token(run.model, "bfloat16") == 61 * 576 * 2
    state = counts.state_bytes(specs, run.optim)
    assert state["masters"] == 4 * 1_026_408_232_448
    assert state["moments"] == 4 * sum(
        s.size * (1 if s.update == "muon" else 2) for s in specs.values() if s.update != "router_bias"
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("deepseek_v3")])
def test_gate_scale_keeps_the_size_of_the_routed_output(name):
    """K2 and DeepSeek-V3 publish rounded values (DeepSeek's 2.5 follows another rule), ours are the formula's."""
    cfg = preset(name).model
    assert cfg.routed_scaling_factor == pytest.approx(gate_scale(cfg.n_routed_experts, cfg.num_experts_per_tok), abs=2e-3)


@pytest.mark.parametrize("name", ["tiny", "laptop", "one_gpu"])
def test_scaled_down_members_suit_every_serving_engine(name):
    cfg = preset(name).model
    assert cfg.hidden_size % 128 == 0 and cfg.moe_intermediate_size % 128 == 0
    assert cfg.q_lora_rank is not None and cfg.rms_norm_eps == 1e-6
