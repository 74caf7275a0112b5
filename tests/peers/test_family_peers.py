"""The family against transformers beyond the covering set: members in the proportions of the released models, and, in the
slow tier, the whole grid of settings and random members that no test names."""

import itertools

import jax
import numpy as np
import pytest
import torch

from configs.schema import ModelConfig
from tests.peers.test_model_peers import GRID, compare, compare_config

SHARED = dict(vocab_size=160, bos_token_id=0, eos_token_id=1, pad_token_id=2, qk_nope_head_dim=8, qk_rope_head_dim=4,
              v_head_dim=8, kv_lora_rank=16, dtype="float32")

RELEASED = {  # widths, heads and ranks over 32 or 64; counts of experts over 8; what decides the mathematics as released
    "kimi_k2": dict(hidden_size=112, num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=24,
                    intermediate_size=288, moe_intermediate_size=32, n_routed_experts=48, num_experts_per_tok=8,
                    n_shared_experts=1, routed_scaling_factor=2.827, rms_norm_eps=1e-6, rope_theta=50000.0,
                    yarn_factor=32.0, yarn_beta_fast=1.0),
    "deepseek_v3": dict(hidden_size=112, num_hidden_layers=5, first_k_dense_replace=3, num_attention_heads=8,
                        q_lora_rank=24, intermediate_size=288, moe_intermediate_size=32, n_routed_experts=32,
                        num_experts_per_tok=8, n_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                        rms_norm_eps=1e-6, rope_theta=10000.0, yarn_factor=40.0),
    "moonlight_16b": dict(hidden_size=64, num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=2,
                          q_lora_rank=None, intermediate_size=352, moe_intermediate_size=44, n_routed_experts=16,
                          num_experts_per_tok=6, n_shared_experts=2, routed_scaling_factor=2.446, rms_norm_eps=1e-5,
                          rope_theta=50000.0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_proportions(name, tmp_path, monkeypatch):
    cfg = ModelConfig(**SHARED | RELEASED[name])
    _, compared = compare_config(cfg, dict(bias=0.1, left_out=True), 0, tmp_path, monkeypatch)
    assert compared > 50


STRUCTURES = [dict(zip(("q_lora_rank", "dense", "n_shared_experts"), values))
              for values in itertools.product(*(GRID[k] for k in ("q_lora_rank", "dense", "n_shared_experts")))]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(map(str, s.values())))
def test_whole_grid(structure, tmp_path, monkeypatch):
    """Every combination: 12 structures of 224 cases, op by op, because nothing compiled would be used twice. The two
    multipliers of YaRN, which the grid does not name, are drawn."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(list(map(ord, str(structure))))
    rest = [name for name in GRID if name not in structure and name != "mscale"]
    worst = 0.0
    for seed, values in enumerate(itertools.product(*(GRID[name] for name in rest))):
        case = structure | dict(zip(rest, values)) | {"mscale": GRID["mscale"][rng.integers(len(GRID["mscale"]))]}
        folder = tmp_path / str(seed)
        folder.mkdir()
        with jax.disable_jit():
            error, _ = compare(case, seed, folder, monkeypatch)
        worst = max(worst, error)
        for file in folder.iterdir():
            file.unlink()
    print(f"{structure}: {seed + 1} cases, largest relative error {worst:.1e}")


def random_member(rng: np.random.Generator) -> ModelConfig:
    """Any widths, ranks, counts and rope settings that the family allows."""
    def pick(*values):
        return values[rng.integers(len(values))]

    groups = pick(1, 2, 4)
    kept, per_group = int(rng.integers(1, groups + 1)), pick(2, 3, 6)
    dense = int(rng.integers(0, 4))
    return ModelConfig(
        vocab_size=int(rng.integers(40, 200)), hidden_size=int(rng.integers(8, 60)), num_hidden_layers=dense + pick(1, 2, 3),
        first_k_dense_replace=dense, num_attention_heads=pick(1, 2, 3, 5), q_lora_rank=pick(None, 7, 12, 24),
        kv_lora_rank=int(rng.integers(4, 40)), qk_nope_head_dim=int(rng.integers(1, 20)), qk_rope_head_dim=2 * pick(2, 3, 8),
        v_head_dim=int(rng.integers(2, 20)), intermediate_size=int(rng.integers(8, 90)),
        moe_intermediate_size=int(rng.integers(4, 40)), n_routed_experts=groups * per_group,
        num_experts_per_tok=int(rng.integers(1, kept * per_group + 1)), n_shared_experts=pick(1, 2, 3),
        norm_topk_prob=bool(rng.integers(2)), routed_scaling_factor=float(rng.uniform(0.5, 3)), n_group=groups, topk_group=kept,
        rms_norm_eps=pick(1e-5, 1e-6), rope_theta=float(pick(1e3, 1e4, 5e4)), yarn_factor=float(pick(1, 4, 32, 40, 64)),
        yarn_original_positions=pick(16, 128, 4096), yarn_beta_fast=float(pick(1, 32)), bos_token_id=0, eos_token_id=1,
        pad_token_id=2, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_members(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng([1, seed])
    cfg = random_member(rng)
    with jax.disable_jit():
        compare_config(cfg, dict(bias=float(rng.choice([0.0, 0.2])), left_out=bool(rng.integers(2))), seed, tmp_path,
                       monkeypatch)
