"""Directories read back: the same arrays, the same bytes when exported again, one sentence when they are wrong."""

import json
import shutil
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.schema import ConfigError, ModelConfig
from data.chat_template import template_settings
from data.tokenizer import ByteTokenizer
from quant.export import export_model
from quant.gguf_metadata import read_vocabulary
from quant.importer import Imported
from quant.packed import projections
from quant.read_config import read_config
from quant.source import InMemory
from quant.tensor_file import Checkpoint, DamagedFile
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights, specs_of
from tests.quant.test_export import read_all

SPECS = specs_of(MODEL)
WEIGHTS = random_weights(SPECS)


def bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def export(directory, model=MODEL, quant=INT4, weights=None, **more):
    export_model(weights or InMemory(WEIGHTS), specs_of(model), model, quant, directory, **more)
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("import") / "int4", shard_bytes=60_000, report={"loss": 1.0})


def test_export_import_export_is_byte_identical(exported, tmp_path):
    """From float32 masters off the grid: the first export moves them there, no later one moves them again."""
    config = read_config(exported)
    assert (config.model, config.quant) == (MODEL, INT4)
    again = export(
        tmp_path / "again",
        config.model,
        config.quant,
        Imported(exported, SPECS, trained_groups=32),
        shard_bytes=60_000,
        report={"loss": 1.0},
    )
    files = sorted(p.name for p in exported.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_weights_come_back_bit_for_bit(tmp_path, dtype):
    model = ModelConfig(**{**MODEL.__dict__, "dtype": dtype})
    source = Imported(export(tmp_path / "plain", model, PLAIN), SPECS)
    for path, spec in SPECS.items():
        want = WEIGHTS[path] if dtype == "float32" or spec.served == "float32" else bf16(WEIGHTS[path])
        np.testing.assert_array_equal(source.region(path), want)


def test_regions_read_what_numpy_indexing_gives(exported):
    source = Imported(exported, SPECS)
    whole = source.region("moe.mlp.experts_gate_up")
    cut = (slice(1, 2), slice(1, 3), slice(0, 32), slice(None), slice(16, 32))
    np.testing.assert_array_equal(source.region("moe.mlp.experts_gate_up", cut), whole[cut])
    np.testing.assert_array_equal(source.read("moe.mlp.experts_gate_up", (1, 2)), whole[1, 2])
    np.testing.assert_array_equal(source.read("embed", ()), bf16(WEIGHTS["embed"]))
    assert source.packed == ["moe.mlp.experts_down", "moe.mlp.experts_gate_up"]


def rewrite(directory, change):
    """Collect all tensors, change the dict, write one file and a fresh index."""
    tensors = read_all(directory)
    change(tensors)
    for file in directory.glob("model*"):
        file.unlink()
    save_file(tensors, directory / "model-00001-of-000001.safetensors", metadata={"format": "pt"})


def test_multi_token_prediction_is_skipped_and_reported(tmp_path):
    directory = export(tmp_path / "mtp")
    rewrite(directory, lambda t: t.update({"model.layers.3.eh_proj.weight": np.zeros((4, 4), np.float32)}))
    assert Imported(directory, SPECS).skipped == {"multi-token prediction, layer 3": ["model.layers.3.eh_proj.weight"]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"model.norm.weight has shape \[3\]"),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.float16)}), "F16"),
        (lambda t: t.update({"model.layers.1.mystery": np.zeros(3, np.float32)}), "mystery is no tensor of this network"),
        (lambda t: t.update({"model.layers.3.self_attn.o_proj.weight": np.zeros(3, np.float32)}), "layers.3.* is no tensor"),
        (lambda t: t.pop("model.layers.1.mlp.experts.0.up_proj.weight_scale"), "do not fit together"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    directory = export(tmp_path / "wrong")
    rewrite(directory, change)
    with pytest.raises(ConfigError, match=message):
        Imported(directory, SPECS)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    directory = export(tmp_path / "nan")
    rewrite(directory, lambda t: t["model.layers.1.mlp.experts.0.up_proj.weight_scale"].fill(np.nan))
    with pytest.raises(ConfigError, match="experts.0.up_proj.weight_scale holds NaN"):
        Imported(directory, SPECS).region("moe.mlp.experts_gate_up")


def test_a_missing_shard_and_a_missing_index_entry_are_named(exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "copy")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shutil.move(shard, tmp_path / "away")
    with pytest.raises(ConfigError, match=rf"should lie in {shard.name}, which does not exist"):
        Imported(directory, SPECS)
    shutil.move(tmp_path / "away", shard)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model.norm.weight is in model-\d+-of-\d+.safetensors but not in the index"):
        Imported(directory, SPECS)


def test_a_truncated_shard_is_named(tmp_path):
    directory = export(tmp_path / "cut")
    file = next(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=file.name):
        Imported(directory, SPECS)


def test_codes_off_the_training_grid_serve_but_do_not_train(tmp_path):
    directory = export(tmp_path / "ct")

    def other_grid(tensors):
        tensors["model.layers.1.mlp.experts.0.up_proj.weight_packed"][0, 0] &= ~np.int32(15)  # code -8

    rewrite(directory, other_grid)
    stem = "model.layers.1.mlp.experts.0.up_proj"
    checkpoint = Checkpoint(directory)
    assert projections(checkpoint)[stem].codes(checkpoint)[0, 0] == -8
    assert np.isfinite(Imported(directory, SPECS).region("moe.mlp.experts_gate_up")).all()
    with pytest.raises(ConfigError, match="up_proj lies on .*masters"):
        Imported(directory, SPECS, trained_groups=32).region("moe.mlp.experts_gate_up")


def test_a_grid_that_is_not_the_files_does_not_train(exported, tmp_path):
    with pytest.raises(ConfigError, match="has groups of 32, but config.json says INT4 in groups of 64"):
        Imported(exported, SPECS, trained_groups=64)
    with pytest.raises(ConfigError, match="is BF16, but config.json says INT4 in groups of 32"):
        Imported(export(tmp_path / "plain", quant=PLAIN), SPECS, trained_groups=32)


def edit(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is ... else config.update({key: value})
    path.write_text(json.dumps(config))


def test_old_and_new_rope_spellings_mean_the_same(tmp_path):
    model = ModelConfig(**{**MODEL.__dict__, "yarn_factor": 32.0, "yarn_beta_fast": 1.0})
    directory = export(tmp_path / "yarn", model, PLAIN)
    assert read_config(directory).model == model
    old = json.loads((directory / "config.json").read_text())
    edit(
        directory,
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={**old["rope_scaling"], "rope_theta": old["rope_theta"], "rope_type": "yarn"},
    )
    assert read_config(directory).model == model


def test_every_stop_token_is_kept(tmp_path):
    """A list in config.json, and what generation_config.json adds; written again as one list."""
    directory = export(tmp_path / "stops")
    edit(directory, eos_token_id=[61, 5])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model = read_config(directory).model
    assert (model.eos_token_id, model.stop_token_ids) == (61, (5, 7))
    again = export(tmp_path / "again", model)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((again / name).read_text())["eos_token_id"] == [61, 5, 7]
    assert read_config(again).model == model


@pytest.mark.parametrize("bad", ["x", [], {}, True, None, -1, 0.5, float("nan"), float("inf")])
def test_no_value_of_a_field_gets_past_the_reader_as_another_type(tmp_path, bad):
    """Every field with every kind of value: understood, or refused in one sentence."""
    directory = export(tmp_path / "any", ModelConfig(**{**MODEL.__dict__, "yarn_factor": 2.0}))
    config = json.loads((directory / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for part in (config, config["rope_scaling"], config["quantization_config"], group, group["weights"]):
        for key in part:
            kept, part[key] = part[key], bad
            (directory / "config.json").write_text(json.dumps(config))
            try:
                read_config(directory)
            except ConfigError as error:
                assert "\n" not in str(error), error
            part[key] = kept


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_nested_without_end_is_named(tmp_path, name):
    directory = export(tmp_path / "deep", quant=PLAIN)
    (directory / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match=f"/{name} is not JSON"):
        read_config(directory)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}", r"tokenizer.json is no Hugging Face tokenizer \(KeyError\('model'\)\); restore it"),
        (b"[]", "is no Hugging Face tokenizer"),
        (b"\xff", "is no Hugging Face tokenizer"),
        (b"[" * 100_000, "is no Hugging Face tokenizer"),
        (b'{"model": {"type": "BPE", "merges": [1], "vocab": {}}}', "is no Hugging Face tokenizer"),
        (b'{"model": {"type": "BPE", "merges": [], "vocab": {"a": "b"}}}', "is no Hugging Face tokenizer"),
        (b'{"model": {"type": "WordPiece"}}', "only byte-level BPE is written"),
    ],
)
def test_a_damaged_tokenizer_makes_no_gguf_file(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_vocabulary(tmp_path, MODEL, None)
    assert "\n" not in str(error.value)


def test_a_template_that_is_no_text_is_named(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{%- set")
    for read in (template_settings, partial(read_vocabulary, m=MODEL, pre_tokenizer=None)):
        with pytest.raises(ConfigError, match="chat_template.jinja is not UTF-8 .*; restore it, or remove it"):
            read(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_theta": ...}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}},
            "truncate",
        ),
        ({"torch_dtype": "float16"}, "float16"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "convert them to bf16"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"vocab_size": 64.0}, "not a whole number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*, which is not a finite 64-bit number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
        ({"text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, message):
    directory = export(tmp_path / "other", quant=PLAIN)
    edit(directory, **changes)
    with pytest.raises(ConfigError, match=message):
        read_config(directory)


def test_a_wrapped_language_model_is_read_with_its_prefix(tmp_path):
    directory = export(tmp_path / "wrapped")
    rewrite(
        directory,
        lambda t: (
            [t.update({f"language_model.{k}": t.pop(k)}) for k in list(t)]
            and t.update({"vision_tower.weight": np.zeros(3, np.float32)})
        ),
    )
    text = json.loads((directory / "config.json").read_text())
    text |= {"temperature": 1.0, "top_k": 50, "return_dict": True, "id2label": {"0": "LABEL_0"}, "num_beams": 1}  # old dumps
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    config = read_config(directory)
    assert (config.model, config.prefix) == (MODEL, "language_model.")
    assert Imported(directory, SPECS, prefix=config.prefix).skipped == {"outside the language model": ["vision_tower.weight"]}
