"""The family against transformers beyond the covering set: members in the proportions of the released models, random
members that no test names, and, in the slow tier, the whole grid of settings and more random members."""

import itertools
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from configs.schema import ModelConfig, QuantConfig
from model.transformer import param_specs
from quant.export import export_model
from quant.importer import Imported
from quant.read_config import read_config
from quant.source import InMemory
from tests.peers.test_model_peers import (
    GRID,
    compare,
    config_of,
    read_by_transformers,
    tokens_and_segments,
    transformers_twin,
    weights_of,
)
from tests.scale.networks import FAST_COMPILE
from train.console import Bar

SHARED = dict(
    vocab_size=160,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    kv_lora_rank=16,
    dtype="float32",
)

RELEASED = {  # widths, heads and ranks over 32 or 64; counts of experts over 8; what decides the mathematics as released
    "kimi_k2": dict(
        hidden_size=112,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=24,
        intermediate_size=288,
        moe_intermediate_size=32,
        n_routed_experts=48,
        num_experts_per_tok=8,
        n_shared_experts=1,
        routed_scaling_factor=2.827,
        rms_norm_eps=1e-6,
        rope_theta=50000.0,
        yarn_factor=32.0,
        yarn_beta_fast=1.0,
    ),
    "deepseek_v3": dict(
        hidden_size=112,
        num_hidden_layers=5,
        first_k_dense_replace=3,
        num_attention_heads=8,
        q_lora_rank=24,
        intermediate_size=288,
        moe_intermediate_size=32,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        yarn_factor=40.0,
    ),
    "moonlight_16b": dict(
        hidden_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=None,
        intermediate_size=352,
        moe_intermediate_size=44,
        n_routed_experts=16,
        num_experts_per_tok=6,
        n_shared_experts=2,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_proportions(name, tmp_path, monkeypatch):
    cfg = ModelConfig(**SHARED | RELEASED[name])
    params = weights_of(cfg, 0.1, 0)
    tokens, segments = tokens_and_segments(cfg, True, 0)
    _, compared = compare(cfg, params, transformers_twin(cfg, params, tmp_path), tokens, segments, monkeypatch)
    assert compared > 50


SHAPES = ("q_lora_rank", "dense", "n_shared_experts")
"""Settings that change shapes."""

STRUCTURES = [dict(zip(SHAPES, values)) for values in itertools.product(*(GRID[name] for name in SHAPES))]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(map(str, s.values())))
def test_whole_grid(structure, tmp_path, monkeypatch):
    """Every combination: 12 structures of 112 cases, each with whole rows and rows with tokens left out; op by op, because
    nothing compiled would be used twice, and with the entries of the registries that have no loops. The two multipliers of
    YaRN, which the grid does not name, are drawn."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(list(map(ord, str(structure))))
    rest = [name for name in GRID if name not in (*SHAPES, "mscale", "left_out")]
    cases = [structure | dict(zip(rest, values)) for values in itertools.product(*(GRID[name] for name in rest))]
    errors, compared = [], 0
    with Bar(str(structure), len(cases), "case") as bar:  # shown with -s
        for seed, case in enumerate(cases):
            case["mscale"] = GRID["mscale"][rng.integers(len(GRID["mscale"]))]
            cfg = replace(config_of(case), num_hidden_layers=case["dense"] + 1)
            params = weights_of(cfg, case["bias"], seed)
            tokens, segments = tokens_and_segments(cfg, (0, 0, 2, 7), seed, positions=12)
            with jax.disable_jit():
                error, clear = compare(
                    cfg, params, transformers_twin(cfg, params, tmp_path), tokens, segments, monkeypatch, platform="gpu"
                )
            monkeypatch.undo()
            errors.append(error)
            compared += clear
            bar.advance()
    print(f"{structure}: {len(errors)} cases, {compared} choices of experts alike, largest relative error {max(errors):.1e}")


def random_member(rng: np.random.Generator) -> ModelConfig:
    """Any widths, ranks, counts and rope settings that the family allows."""

    def pick(*values):
        return values[rng.integers(len(values))]

    groups = pick(1, 2, 4)
    kept, per_group = int(rng.integers(1, groups + 1)), pick(2, 3, 6)
    dense = int(rng.integers(0, 4))
    width, hidden = int(rng.integers(8, 60)), int(rng.integers(4, 40))
    if rng.integers(3) == 0:  # whole groups of the INT4 grid
        width, hidden = 32 * pick(1, 2), 32 * pick(1, 2)
    factor = pick(1, 4, 32, 40, 64)
    yarn = (
        {}
        if factor == 1
        else dict(yarn_factor=float(factor), yarn_original_positions=pick(16, 128, 4096), yarn_beta_fast=float(pick(1, 32)))
    )
    return ModelConfig(
        vocab_size=int(rng.integers(40, 200)),
        hidden_size=width,
        num_hidden_layers=dense + pick(1, 2, 3),
        first_k_dense_replace=dense,
        num_attention_heads=pick(1, 2, 3, 5),
        q_lora_rank=pick(None, 7, 12, 24),
        kv_lora_rank=int(rng.integers(4, 40)),
        qk_nope_head_dim=int(rng.integers(1, 20)),
        qk_rope_head_dim=2 * pick(2, 3, 8),
        v_head_dim=int(rng.integers(2, 20)),
        intermediate_size=int(rng.integers(8, 90)),
        moe_intermediate_size=hidden,
        n_routed_experts=groups * per_group,
        num_experts_per_tok=int(rng.integers(1, kept * per_group + 1)),
        n_shared_experts=pick(1, 2, 3),
        norm_topk_prob=bool(rng.integers(2)),
        routed_scaling_factor=float(rng.uniform(0.5, 3)),
        n_group=groups,
        topk_group=kept,
        rms_norm_eps=pick(1e-5, 1e-6),
        rope_theta=float(pick(1e3, 1e4, 5e4)),
        **yarn,
        bos_token_id=0,
        eos_token_id=1,
        stop_token_ids=pick((), (3, 4)),
        pad_token_id=2,
        dtype=pick("float32", "bfloat16"),
    )


def there_and_back(cfg: ModelConfig, quant: QuantConfig, arrays: dict[str, np.ndarray], folder) -> dict[str, np.ndarray]:
    """Exported, imported, exported again: the same config and the same bytes. What was imported is returned."""
    specs = param_specs(cfg)
    export_model(InMemory(arrays), specs, cfg, quant, folder / "first", shard_bytes=20_000)
    read = read_config(folder / "first")
    assert (read.model, read.quant) == (cfg, quant)
    source = Imported(folder / "first", specs, trained_groups=quant.group_size if quant.grid != "none" else None)
    export_model(source, specs, cfg, quant, folder / "second", shard_bytes=20_000)
    for file in (folder / "first").iterdir():
        assert file.read_bytes() == (folder / "second" / file.name).read_bytes(), file.name
    return {path: source.region(path) for path in specs}


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 100))])
def test_random_members(seed, tmp_path, monkeypatch):
    """Through our files: what comes back is what went in, in bf16 or f32 and, where groups fit, on the INT4 grid; and the
    imported weights give the logits that transformers gives for the same files."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([1, seed])
    cfg = random_member(rng)
    arrays = {path: np.asarray(x) for path, x in weights_of(cfg, float(rng.choice([0.0, 0.2])), seed).items()}
    imported = there_and_back(cfg, QuantConfig(grid="none"), arrays, tmp_path)
    for path, spec in param_specs(cfg).items():
        rounded = cfg.dtype == "bfloat16" and spec.served is None
        want = arrays[path].astype(ml_dtypes.bfloat16).astype(np.float32) if rounded else arrays[path]
        np.testing.assert_array_equal(imported[path], want, err_msg=path)
    tokens, segments = tokens_and_segments(cfg, bool(rng.integers(2)), seed)
    twin = read_by_transformers(tmp_path / "first")
    compare(cfg, imported, twin, tokens, segments, monkeypatch, FAST_COMPILE)
    if cfg.hidden_size % 32 == cfg.moe_intermediate_size % 32 == 0:
        (tmp_path / "int4").mkdir()
        there_and_back(cfg, QuantConfig(), arrays, tmp_path / "int4")
