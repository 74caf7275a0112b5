"""`launch.py import`: a directory or its files, and what is refused before anything is written."""

import dataclasses
import errno
import json
import math
import shutil

import numpy as np
import pytest

import launch
from configs.presets import preset
from configs.schema import MeshConfig, ModelConfig, QuantConfig
from data.tokenizer import load_tokenizer
from model.transformer import param_specs
from quant.export import export_model
from quant.importer import Imported
from quant.source import InMemory
from train.checkpoint import Checkpoints
from train.mesh import make_mesh, param_shardings
from train.run_dir import RunDir, with_network_of
from train.stop import EXIT_DONE, EXIT_USAGE
from train.weights import load_weights

MODEL = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=64,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    dtype="float32",
)
SPECS = param_specs(MODEL)
SMALL = ["--train.batch-size", "8"]
SHORT = ["--train.seq-len", "64", "--data.task-length", "1", "2"]


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(spec.shape).astype(np.float32) for path, spec in SPECS.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, weights):
    """float32, several shards."""
    directory = tmp_path_factory.mktemp("hf") / "checkpoint"
    export_model(InMemory(weights), SPECS, MODEL, QuantConfig(grid="none"), directory, shard_bytes=100_000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def imported(run):
    return load_weights(f"{run}:bf16", dtype="float32").params


def test_files_from_two_directories_are_one_checkpoint(checkpoint, weights, tmp_path):
    """Shards in two places, config.json in a third, no index: the same weights bit for bit."""
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    shards = sorted(checkpoint.glob("*.safetensors"))
    files = [shutil.copy(shard, places[i % 2]) for i, shard in enumerate(shards)]
    files.append(shutil.copy(checkpoint / "config.json", places[2]))
    run = tmp_path / "run"
    assert launch.main(["import", *map(str, files), "--run", str(run), *SMALL]) == EXIT_DONE
    for path, array in imported(run).items():
        np.testing.assert_array_equal(np.asarray(array), weights[path], err_msg=path)
    assert str(files[0]) in RunDir(run).load_facts()["imported_from"]


def test_system_message_and_mode_travel_with_the_weights(checkpoint, tmp_path):
    """From an exported directory into a run, and to whoever asks either; a directory that says nothing leaves it to the
    settings."""
    run, settings = tmp_path / "run", ["--data.system", "mine", "--data.mode", "preserved"]
    assert launch.main(["import", str(checkpoint), "--run", str(tmp_path / "plain"), *SMALL, *settings]) == EXIT_DONE
    told = shutil.copytree(checkpoint, tmp_path / "told")
    load_tokenizer("bytes").save(told, "Be brief.", "preserved")
    assert launch.main(["import", str(told), "--run", str(run), *SMALL]) == EXIT_DONE
    for source, system, mode in (
        (checkpoint, None, "interleaved"),
        (tmp_path / "plain", "mine", "preserved"),
        (told, "Be brief.", "preserved"),
        (run, "Be brief.", "preserved"),
    ):
        weights = load_weights(f"{source}:bf16", dtype="float32")
        assert (weights.system, weights.mode) == (system, mode)


def test_an_import_needs_its_source_no_longer(checkpoint, tmp_path, capsys):
    """The tokenizer is the run's own, wherever that is moved, and comes with the weights to a run that starts from it. What is
    kept of the weights is said."""
    source, run, blob = shutil.copytree(checkpoint, tmp_path / "source"), tmp_path / "run", tmp_path / "0a1b2c"
    load_tokenizer("bytes").save(source)
    read = load_tokenizer(str(source)).fingerprint()
    (source / "tokenizer.json").rename(blob)
    (source / "tokenizer.json").symlink_to(blob)  # as a cache of Hugging Face's keeps files
    assert launch.main(["import", str(source), "--run", str(run), *SMALL, "--optim.master-dtype", "bfloat16"]) == EXIT_DONE
    assert f"weights into {run} (float32, kept in bfloat16)" in capsys.readouterr().out
    shutil.rmtree(source)
    blob.unlink()
    assert RunDir(run).load_config().data.tokenizer == str(run / "tokenizer" / "tokenizer.json")
    assert RunDir(run).load_facts()["tokenizer"] == read
    moved = run.rename(tmp_path / "moved")
    assert load_weights(str(moved)).tokenizer.fingerprint() == read
    assert with_network_of(preset("tiny"), None, f"{moved}@0").data.tokenizer == str(moved / "tokenizer" / "tokenizer.json")


def test_a_mesh_gets_its_parts_one_by_one(checkpoint, weights, tmp_path, monkeypatch):
    """Never more than one device's part of an array is asked for, and what two devices hold alike only once."""
    asked, region = [], Imported.region

    def watched(self, path, index=()):
        part = region(self, path, index)
        asked.append((path, str(index), part.size))
        return part

    monkeypatch.setattr(Imported, "region", watched)
    run = tmp_path / "run"
    assert (
        launch.main(
            ["import", str(checkpoint), "--run", str(run), *SMALL, "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.expert", "2"]
        )
        == EXIT_DONE
    )
    monkeypatch.undo()
    assert len({part[:2] for part in asked}) == len(asked)
    shardings = param_shardings(SPECS, make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))
    for path, spec in SPECS.items():
        sizes = [size for other, _, size in asked if other == path]
        assert sum(sizes) == spec.size and set(sizes) == {math.prod(shardings[path].shard_shape(spec.shape))}, path
    assert max(size for path, _, size in asked if path == "moe.mlp.experts_gate_up") * 4 == SPECS["moe.mlp.experts_gate_up"].size
    for path, array in imported(run).items():
        np.testing.assert_array_equal(np.asarray(array), weights[path], err_msg=path)


@pytest.fixture(scope="module")
def run_of_another_stop(tmp_path_factory, weights):
    """Imported; as in Kimi K2's files, what ends a document is the first stop token and what ends a message another."""
    folder = tmp_path_factory.mktemp("stops")
    model = dataclasses.replace(MODEL, eos_token_id=259, stop_token_ids=(258,), max_position_embeddings=64)
    export_model(InMemory(weights), SPECS, model, QuantConfig(grid="none"), folder / "checkpoint")
    assert launch.main(["import", str(folder / "checkpoint"), "--run", str(folder / "run"), *SMALL]) == EXIT_DONE
    return RunDir(folder / "run")


def test_training_goes_on_from_an_import(run_of_another_stop, weights, tmp_path, capsys):
    """The network comes with the weights, whatever the preset has, whose rows would be too long for it; a longer context is
    set anew. At a rate of nearly zero the weights stay; resuming takes the network from the run itself."""
    source, run = run_of_another_stop, RunDir(tmp_path / "run")
    command = [
        "train",
        "--preset",
        "tiny",
        "--run",
        str(run.path),
        "--train.init-from",
        str(source.path),
        *SMALL,
        "--model.yarn-factor=4",
        "--model.max_position_embeddings",
        "16384",
        "--optim.lr",
        "1e-12",
        "--optim.qk-clip-tau",
        "None",
        "--quant.grid",
        "none",
        *SHORT,
        "--train.compute-dtype",
        "float32",
    ]
    assert launch.main([*command, "--train.steps", "1"]) == EXIT_DONE
    model = run.load_config().model
    assert model == dataclasses.replace(source.load_config().model, yarn_factor=4.0, max_position_embeddings=16384)
    for path, array in imported(run.path).items():
        if SPECS[path].update != "router_bias":
            np.testing.assert_allclose(np.asarray(array), weights[path], atol=1e-9, err_msg=path)
    assert launch.main([*command, "--train.steps", "1"]) == EXIT_DONE
    assert "already trained to step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--run", "IMPORTED"], "holds imported weights; name a new directory"),
        (["--train.fork-from", "IMPORTED", *SHORT], "no optimizer state; take them with --train.init-from"),
        (["--train.init-from", "IMPORTED", "--model.hidden-size", "96", *SHORT], "embed is [320, 96] here and [320, 64] in"),
        (["--train.init-from", "IMPORTED"], "train.seq_len=96 is more than model.max_position_embeddings=64"),
        (["--train.init-from", "EXPORTED"], "is a Hugging Face directory, not a run; import it first"),
        (["--train.init-from", "IMPORTED", "--train.init_from", "x"], "--train.init-from is given twice"),
    ],
)
def test_what_cannot_go_on_from_an_import(run_of_another_stop, tmp_path, capsys, flags, sentence):
    places = {"IMPORTED": run_of_another_stop.path, "EXPORTED": run_of_another_stop.path.parent / "checkpoint"}
    flags = [str(places.get(word, word)) for word in flags]
    where = [] if "--run" in flags else ["--run", str(tmp_path / "run")]
    assert launch.main(["train", *where, *flags, *SMALL]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def cut_off(directory):
    """The last shard ends too early."""
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    header = file.read_bytes()
    rows = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    rows.pop("__metadata__", None)
    return file.name, max(rows, key=lambda name: rows[name]["data_offsets"][1])


def unlisted(directory):
    """A tensor is in its file but not in the index."""
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    return file, "model.norm.weight"


def other_shape(directory):
    """config.json promises another width than the files hold."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"v_head_dim": 24}))
    return ".safetensors", "_proj.weight"


def other_architecture(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    return "config.json", "llama"


def lost_shard(directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    return file.name, ".weight"


@pytest.mark.parametrize("damage", [cut_off, unlisted, other_shape, other_architecture, lost_shard])
def test_damage_is_one_sentence_and_nothing_is_written(checkpoint, tmp_path, capsys, damage):
    """The sentence names the file and the tensor."""
    broken, run = shutil.copytree(checkpoint, tmp_path / "broken"), tmp_path / "run"
    file, tensor = damage(broken)
    assert launch.main(["import", str(broken), "--run", str(run)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert file in error and tensor in error and error.count("\n") == 1
    assert not run.exists()


def test_a_full_disk_says_how_to_import_again(checkpoint, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    command = ["import", str(checkpoint), "--run", str(run), *SMALL]

    def save(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Checkpoints, "save", save)
        assert launch.main(command) == EXIT_USAGE
    assert capsys.readouterr().err == (
        f"error: {run}/checkpoints cannot be written (No space left on device); free some space, remove {run} and import again\n"
    )
    assert launch.main(command) == EXIT_USAGE
    shutil.rmtree(run)
    assert launch.main(command) == EXIT_DONE


@pytest.mark.parametrize(
    "pick, message",
    [
        (lambda d: [d / "nowhere"], "nowhere does not exist"),
        (lambda d: sorted(d.glob("*.safetensors")), "config.json is not among"),
        (lambda d: [d, d / "config.json"], "is a directory"),
        (lambda d: [d / "config.json", d / "config.json"], "given twice"),
        (lambda d: [], "name what to import"),
        (lambda d: [d / "config.json"], "no .safetensors file"),
    ],
)
def test_a_wrong_list_is_one_sentence(checkpoint, tmp_path, capsys, pick, message):
    run = tmp_path / "run"
    assert launch.main(["import", *map(str, pick(checkpoint)), "--run", str(run)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not run.exists()
