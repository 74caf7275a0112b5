"""A checkpoint written by transformers itself, imported with the command line: the same logits, and the same tensors out."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import launch
from tests.model.networks import forward_logits
from train.weights import load_weights

YARN = dict(
    type="yarn", factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=64
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def written(request, tmp_path_factory):
    """Random weights in shards of at most 100 kB."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.0,
        rope_theta=50000.0,
        rope_scaling=YARN,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=257,
        initializer_range=0.2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    network = DeepseekV3ForCausalLM(config).to(getattr(torch, request.param)).eval()
    directory = tmp_path_factory.mktemp("hf") / request.param
    network.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return request.param, directory


@pytest.fixture(scope="module")
def imported(written, tmp_path_factory):
    dtype, directory = written
    run = tmp_path_factory.mktemp("run") / dtype
    assert launch.main(["import", str(directory), "--run", str(run), "--train.batch-size", "8"]) == 0
    return run


def test_logits(written, imported):
    """In float32, from the imported run and from the directory itself; the weights of a bf16 file are exact in float32.
    (transformers reads its own file again: casting a network to bf16 also rounds its rope frequencies.)"""
    _, directory = written
    network = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 320, (3, 40))
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens)).logits.numpy()
    assert theirs.std() > 0.1
    for source in (f"{imported}:bf16", str(directory)):
        weights = load_weights(source, dtype="float32")
        ours = forward_logits(weights.model, weights.params, tokens, weights.platform, "float32")
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), source


def test_tensors_come_out_as_they_went_in(written, imported, tmp_path):
    dtype, directory = written
    assert launch.main(["export", str(imported), "--format", "bf16", "--out", str(tmp_path / "out")]) == 0

    def tensors(where):
        return {name: x for file in where.glob("*.safetensors") for name, x in load_file(file).items()}

    before, after = tensors(directory), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(after[name].to(x.dtype), x), name
