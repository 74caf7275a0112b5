"""`launch.py import`: a Hugging Face directory, or its files one by one, become a run whose step 0 holds the weights."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp

from configs.schema import ConfigError, RunConfig, require
from optim.build import build_optimizer
from quant.importer import Imported
from quant.read_config import read_config
from quant.tensor_file import Checkpoint
from quant.verify_files import INDEX
from train.checkpoint import Checkpoints
from train.compat import interpreter
from train.console import Bar, console, human
from train.mesh import param_shardings
from train.run_dir import RunDir
from train.session import open_session
from train.state import TrainState, state_shardings
from train.weights import tokenizer_file


@contextmanager
def one_directory(sources: Sequence[Path]) -> Iterator[Path]:
    """A directory given alone, or one of links to the given files, with an index if they bring none."""
    missing = next((path for path in sources if not path.exists()), None)
    require(missing is None, f"{missing} does not exist")
    if len(sources) == 1 and sources[0].is_dir():
        yield sources[0]
        return
    names = [path.name for path in sources]
    folder = next((path for path in sources if path.is_dir()), None)
    require(folder is None, f"{folder} is a directory; give one directory, or files only")
    require("config.json" in names, f"config.json is not among {', '.join(names)}; name it too")
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{twice} is given twice, from different directories")
    with tempfile.TemporaryDirectory() as folder:
        for path in sources:
            (Path(folder) / path.name).symlink_to(path.resolve())
        if INDEX not in names:
            files = Checkpoint(folder).files
            (Path(folder) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        yield Path(folder)


def import_checkpoint(sources: Sequence[Path], base: RunConfig, run: RunDir) -> int:
    """Read a bf16, f32 or INT4 pack-quantized checkpoint of the DeepSeek-V3 family into a new run directory: a
    directory, or a list of its files with config.json among them.

    Network and grid come from the files, all else from `base`. Weights are read block by block, straight into the
    mesh's sharding. Everything is checked before anything is written.
    """
    with one_directory(sources) as directory:
        return _import(directory, ", ".join(map(str, sources)), base, run)


def _import(directory: Path, named: str, base: RunConfig, run: RunDir) -> int:
    if run.exists() or Checkpoints(run.checkpoints).steps():
        raise ConfigError(f"{run.path} exists; name a new directory with --run")
    found = read_config(directory)
    beside = tokenizer_file(directory)
    tokenizer = str(Path(beside).resolve()) if beside else base.data.tokenizer  # links do not outlive the import
    cfg = dataclasses.replace(base, model=found.model, quant=found.quant,
                              data=dataclasses.replace(base.data, tokenizer=tokenizer))
    session = open_session(cfg)
    files = Imported(directory, session.specs, prefix=found.prefix, for_training=found.quant.grid != "none")
    shardings = param_shardings(session.specs, session.mesh)
    optimizer = build_optimizer(session.specs, cfg.optim, cfg.train.steps, mesh=session.mesh, shardings=shardings)

    params = {}
    with Bar(f"importing {named}", len(session.specs), "array") as bar:
        for path, spec in session.specs.items():
            dtype = jnp.float32 if spec.update == "router_bias" else jnp.dtype(cfg.optim.master_dtype)
            params[path] = jax.make_array_from_callback(
                spec.shape, shardings[path], lambda index, path=path, dtype=dtype: files.region(path, index).astype(dtype))
            bar.advance()
    for note in (*found.notes, *(f"left out: {name}" for name in files.skipped)):
        console.print(note, markup=False)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state_shardings(cfg, session.specs, optimizer, session.mesh))
    state = TrainState(params, jax.jit(optimizer.init, out_shardings=placed.optimizer)(params),
                       jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    run.write_config(cfg, {"compute_dtype": session.compute_dtype, "imported_from": named,
                           "versions": interpreter()})
    checkpoints = Checkpoints(run.checkpoints, cfg.train.keep)
    checkpoints.save(0, state)
    checkpoints.close()
    console.print(f"imported {human(sum(s.size for s in session.specs.values()))} weights into {run.path} "
                  f"({'INT4 grid' if found.quant.grid != 'none' else found.model.dtype}); train on with: "
                  f"python launch.py train --run {run.path} --train.init-from {run.path}@0")
    return 0
