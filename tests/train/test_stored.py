"""A checkpoint exported from disk piece by piece: the same files as from memory, and damage found before a word is written."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore

import train.export
from configs.schema import ConfigError
from model.decode.served_params import serve
from quant.evidence import FILE, Probe
from quant.export import export_model
from quant.served import Serving
from quant.source import InMemory
from tests.model.networks import forward_logits
from train import probe
from train.checkpoint import CheckpointError, Checkpoints, fingerprint
from train.export import _measured, _TokenizerFiles, export_run
from train.session import load_params, open_session
from train.stored import StoredParams


@pytest.fixture(scope="module")
def session(trained):
    return open_session(trained.load_config(), "float32")


@pytest.mark.parametrize("form", ["int4", "bf16"])
def test_the_files_are_those_of_an_export_from_memory(trained, session, tmp_path, form):
    """Byte for byte; only the probe may differ in its last bits, because layers are compiled one by one."""
    params, step = load_params(session, trained)
    cfg = session.cfg
    quant = dataclasses.replace(cfg.quant, grid="none" if form == "bf16" else "int4")
    rows = np.arange(64, dtype=np.int32).reshape(2, 32) % cfg.model.vocab_size
    export_model(
        InMemory(params),
        session.specs,
        cfg.model,
        quant,
        tmp_path / "memory",
        tokenizer=_TokenizerFiles(session),
        report=_measured(trained, step, quant),
        probe=Probe.of(rows, np.zeros((2, 32, cfg.model.vocab_size), np.float32)),
    )
    export_run(str(trained.path), tmp_path / "disk", form)
    files = sorted(p.name for p in (tmp_path / "memory").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "disk").iterdir()) and len(files) > 6
    for name in files:
        here, there = ((tmp_path / source / name).read_bytes() for source in ("memory", "disk"))
        if name == FILE:
            here, there = ({k: v for k, v in json.loads(text).items() if k != "probe"} for text in (here, there))
        assert here == there, name


@pytest.mark.parametrize("grid", ["int4", "none"])
def test_logits_layer_by_layer(trained, session, grid):
    """Against the whole network at once, on all of whose layers the same weights lie: 1e-5 of the largest logit, sums in
    another order."""
    params, _ = load_params(session, trained)
    serving = Serving(session.cfg.model.dtype, grid, session.cfg.quant.group_size)
    rows = np.arange(48, dtype=np.int32).reshape(2, 24)
    found = probe.logits(InMemory(params), session.specs, session.cfg.model, serving, rows, "cpu")
    served = serve(params, session.specs, serving, 1.0, "float32")
    wanted = forward_logits(session.cfg.model, served, rows, "cpu")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_pieces_of_experts_are_read_alone(tmp_path):
    """Arrays large enough to be cut: every expert is a piece of its own on disk, whatever holds it in memory."""
    arrays = {
        "moe.experts": np.random.default_rng(0).normal(size=(2, 3, 512, 513)).astype(np.float32),
        "moe.norm": np.ones((2, 16), np.float32),
        "single": np.full((2, 1), 3, np.float32),
        "embed": np.arange(17 * 2**20, dtype=np.float32).reshape(-1, 2**10),
    }
    checkpoints = Checkpoints(tmp_path / "what a#URL?cannot%20hold")
    checkpoints.save(7, {"params": jax.device_put(arrays)})
    checkpoints.close()
    stored = checkpoints.stored({path: x.shape for path, x in arrays.items()})
    source = stored.state
    assert isinstance(source, StoredParams) and stored.step == 7
    assert source._chunk("moe.experts") == (1, 1, 512, 513) and np.prod(source._chunk("embed")) <= 2**24
    for path, index in (
        ("moe.experts", (1, 2)),
        ("moe.norm", (1,)),
        ("moe.norm", (0,)),
        ("single", (1,)),
        ("single", (1, 0)),
        ("embed", ()),
    ):
        np.testing.assert_array_equal(source.read(path, index), arrays[path][index])
    for path, x in arrays.items():
        assert source.fingerprint(path, fingerprint) == int(fingerprint(jax.numpy.asarray(x)))


@pytest.mark.parametrize("gone", ["*", "d/*"])
def test_a_checkpoint_that_goes_away_is_not_read_as_zeros(tmp_path, gone):
    """Training deletes old checkpoints, whole or file by file, while an export reads one."""
    arrays = {"moe.experts": np.ones((2, 3, 512, 513), np.float32), "norm": np.zeros(16, np.float32)}
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"params": jax.device_put(arrays)})
    checkpoints.close()
    source = checkpoints.stored({path: x.shape for path, x in arrays.items()}).state
    np.testing.assert_array_equal(source.read("norm", ()), 0)
    for path in (tmp_path / "run" / "1" / "state").rglob(gone):
        if path.is_file():
            path.unlink()
    with pytest.raises(ConfigError, match=r"run/1 went away or was damaged while it was read .*RUN@STEP"):
        source.read("moe.experts", (1, 2))


def test_an_export_of_a_checkpoint_that_goes_away_is_refused(trained, tmp_path, monkeypatch):
    """And leaves nothing that looks like one."""
    run, stored = tmp_path / "run", train.export._stored
    shutil.copytree(trained.path, run)

    def then_deleted(*arguments):
        found = stored(*arguments)
        shutil.rmtree(run / "checkpoints" / str(found.step))
        return found

    monkeypatch.setattr(train.export, "_stored", then_deleted)
    with pytest.raises(ConfigError, match="went away or was damaged while it was read"):
        export_run(str(run), tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_anything_is_written(tmp_path):
    arrays = {"moe.experts": np.ones((2, 3, 512, 513), np.float32)}
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2):
        checkpoints.save(step, {"params": jax.device_put(arrays)})
    checkpoints.close()
    shapes = {path: x.shape for path, x in arrays.items()}
    data = max((tmp_path / "run" / "2").rglob("d/*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    found = checkpoints.stored(shapes)
    assert found.step == 1 and "cannot be read" in found.damaged[0]
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.stored(shapes, 2)
    params = StoredParams(tmp_path / "run" / "1", shapes)
    kvstore = params._stores["moe.experts"].kvstore.spec()
    tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()[1, 1, 5, 5].write(1 + 2**-20).result()
    with pytest.raises(CheckpointError, match="1 of 1 arrays differ from what was saved, the first is params/moe.experts"):
        checkpoints.stored(shapes, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9"):
        checkpoints.stored(shapes, 9)
