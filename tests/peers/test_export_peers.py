"""Foreign judges of an export: compressed-tensors for the codes, transformers for names, config and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import ModelConfig
from quant import grid
from quant.export import export_model
from quant.importer import Imported
from quant.pack import pack, unpack
from quant.read_config import read_config
from quant.source import InMemory
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights, specs_of

YARN = ModelConfig(**{**MODEL.__dict__, "yarn_factor": 4.0, "yarn_original_positions": 32, "max_position_embeddings": 128})


def torch_bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.float32))).to(torch.bfloat16)


def test_packing_equals_compressed_tensors_on_ten_million_codes():
    codes = np.random.default_rng(0).integers(-8, 8, (2560, 4096)).astype(np.int8)
    assert codes.size >= 10**7
    theirs = pack_to_int32(torch.from_numpy(codes), 4).numpy()
    np.testing.assert_array_equal(pack(codes), theirs)
    np.testing.assert_array_equal(unpack(theirs), unpack_from_int32(torch.from_numpy(pack(codes)), 4, codes.shape).numpy())


def ct_scheme():
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def test_compress_and_decompress_agree_with_the_forward():
    """Their compressor on our masters with our scales gives our bytes; their decompressor our forward weights."""
    w = np.random.default_rng(1).normal(0, 0.02, (256, 512)).astype(np.float32)
    codes, scales = jax.jit(grid.quantize, static_argnums=(1, 2))(w, -1, 32)
    forward = np.asarray(jax.jit(grid.on_grid, static_argnums=(1, 2))(w, -1, 32))
    words, scheme = pack(np.asarray(codes)), ct_scheme()
    packed = PackedQuantizationCompressor.compress(
        {"weight": torch.from_numpy(w), "weight_scale": torch_bf16(np.asarray(scales))}, scheme
    )
    np.testing.assert_array_equal(packed["weight_packed"].numpy(), words)
    plain = PackedQuantizationCompressor.decompress(packed, scheme)
    assert plain["weight"].dtype == torch.bfloat16
    np.testing.assert_array_equal(plain["weight"].float().numpy(), forward)


def load(directory, **more):
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **more
    )
    return model.eval(), report


def no_surprises(report) -> bool:
    return not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.fixture(scope="module", params=["plain rope", "yarn"])
def exported(request, tmp_path_factory):
    model = {"plain rope": MODEL, "yarn": YARN}[request.param]
    directory = tmp_path_factory.mktemp("peer") / "int4"
    specs = specs_of(model)
    export_model(InMemory(random_weights(specs, scale=0.1)), specs, model, INT4, directory, shard_bytes=200_000)
    return model, specs, directory


def test_transformers_loads_every_tensor_and_agrees_with_a_dense_twin(exported, tmp_path):
    """Bit-equal logits: INT4 directory against a bf16 directory that holds the dequantised forward weights."""
    model, specs, directory = exported
    masters = random_weights(specs, scale=0.1)
    axis = {path: spec.axis(spec.matrix.rows[0]) - len(spec.axes) for path, spec in specs.items() if spec.on_grid}
    dense = {path: np.asarray(grid.on_grid(jnp.asarray(w), axis[path], 32)) if path in axis else w for path, w in masters.items()}
    export_model(InMemory(dense), specs, model, PLAIN, tmp_path / "dense")
    packed, report = load(directory)
    twin, twin_report = load(tmp_path / "dense")
    assert no_surprises(report) and no_surprises(twin_report), (report, twin_report)
    tokens = torch.arange(48).reshape(2, 24) % 60
    with torch.no_grad():
        a, b = packed(tokens).logits, twin(tokens).logits
    assert torch.isfinite(a).all() and a.std() > 0.1
    assert torch.equal(a, b)


def test_transformers_reads_the_config_as_written(exported):
    model, _, directory = exported
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == "deepseek_v3"
    rope = config.rope_parameters
    assert rope["rope_theta"] == model.rope_theta
    assert rope.get("factor", 1.0) == model.yarn_factor
    for name in ("hidden_size", "n_routed_experts", "routed_scaling_factor", "norm_topk_prob", "rms_norm_eps", "n_group"):
        assert getattr(config, name) == getattr(model, name)


def test_we_read_the_config_that_transformers_writes(exported, tmp_path):
    model, _, directory = exported
    config = AutoConfig.from_pretrained(directory)
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path).model == model


def test_transformers_writes_weights_that_we_import(exported, tmp_path):
    model, specs, directory = exported
    export_model(InMemory(random_weights(specs, seed=3)), specs, model, PLAIN, tmp_path / "ours")
    load(tmp_path / "ours")[0].save_pretrained(tmp_path / "theirs")
    ours, theirs = Imported(tmp_path / "ours", specs), Imported(tmp_path / "theirs", specs)
    for path in specs:
        np.testing.assert_array_equal(ours.region(path), theirs.region(path))
