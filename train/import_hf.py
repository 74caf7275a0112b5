"""`launch.py import`: a Hugging Face directory, or its files one by one, become a run whose step 0 holds the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import jax
import jax.numpy as jnp

from configs.param_spec import ParamSpec, Specs
from configs.schema import ConfigError, RunConfig, require
from data.chat_template import template_settings
from quant.importer import Imported
from quant.read_config import read_config
from quant.tensor_file import Checkpoint
from quant.verify_files import INDEX
from train import processes
from train.checkpoint import Checkpoints
from train.compat import interpreter
from train.console import Bar, console, human
from train.mesh import param_shardings
from train.run_dir import RunDir
from train.session import open_session
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
    require(any(name.endswith(".safetensors") for name in names), "no .safetensors file is named; give all shards")
    with tempfile.TemporaryDirectory() as folder:
        for path in sources:
            (Path(folder) / path.name).symlink_to(path.resolve())
        if INDEX not in names:
            files = Checkpoint(folder).files
            (Path(folder) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        yield Path(folder)


def import_checkpoint(sources: Sequence[Path], base: RunConfig, preset: str, run: RunDir) -> int:
    """Read a bf16, f32 or INT4 pack-quantized checkpoint of the DeepSeek-V3 family into a new run directory: a
    directory, or a list of its files with config.json among them.

    Network and grid come from the files, and data.system and data.mode where an exported chat template sets them; all else is
    `base`'s, the preset of this name. Weights are read block by block, straight into the mesh's sharding. Everything is
    checked before anything is written.
    """
    with one_directory(sources) as directory:
        return _import(directory, ", ".join(map(str, sources)), base, preset, run)


def _place(
    files: Imported, specs: Specs, shardings: dict[str, jax.sharding.Sharding], dtype: jnp.dtype, named: str
) -> dict[str, jax.Array]:
    """Every array on its devices. The host holds one device's part of one array at a time, and one tensor of the files;
    what several devices hold alike is read once."""
    holders: dict[str, dict[tuple, list[jax.Device]]] = {path: defaultdict(list) for path in specs}
    for path, spec in specs.items():
        for device, index in shardings[path].addressable_devices_indices_map(spec.shape).items():
            holders[path][tuple((cut.start, cut.stop) for cut in index)].append(device)

    def array(path: str, spec: ParamSpec) -> jax.Array:
        on_devices = []
        for index, devices in holders[path].items():
            part = files.region(path, tuple(slice(*cut) for cut in index))
            part = part.astype(jnp.float32 if spec.update == "router_bias" else dtype, copy=False)
            on_devices += jax.block_until_ready([jax.device_put(part, device) for device in devices])
            bar.advance(part.size)
        return jax.make_array_from_single_device_arrays(spec.shape, shardings[path], on_devices)

    total = sum(len(parts) * math.prod(shardings[path].shard_shape(specs[path].shape)) for path, parts in holders.items())
    with Bar(f"importing {named}", total, "weight") as bar:
        return {path: array(path, spec) for path, spec in specs.items()}


def _import(directory: Path, named: str, base: RunConfig, preset: str, run: RunDir) -> int:
    whole = bool(Checkpoints(run.checkpoints).steps())
    if run.exists() and not whole and run.load_facts().get("imported_from"):
        raise ConfigError(
            f"{run.path} holds an import that is not whole; if it is not being written just now, remove it, or "
            "name a new directory with --run"
        )
    if run.exists() or whole:
        raise ConfigError(f"{run.path} exists; name a new directory with --run")
    found = read_config(directory)
    beside = tokenizer_file(directory)
    tokenizer = str(Path(beside).resolve()) if beside else base.data.tokenizer  # links do not outlive the import
    rows = min(base.train.seq_len, found.model.max_position_embeddings)
    cfg = dataclasses.replace(
        base,
        model=found.model,
        quant=found.quant,
        train=dataclasses.replace(base.train, seq_len=rows),
        data=dataclasses.replace(base.data, tokenizer=tokenizer, **template_settings(directory)),
    ).checked()
    session = open_session(cfg)
    files = Imported(
        directory,
        session.specs,
        prefix=found.prefix,
        trained_groups=found.quant.group_size if found.quant.grid != "none" else None,
    )
    shardings = param_shardings(session.specs, session.mesh)
    params = _place(files, session.specs, shardings, jnp.dtype(cfg.optim.master_dtype), named)
    left_out = (
        f"left out, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for reason, names in files.skipped.items()
    )
    for note in (*found.notes, *left_out):
        console.print(note, markup=False)
    processes.meet("before anything is written")
    checkpoints = Checkpoints(run.checkpoints, cfg.train.keep)
    with processes.alone(run, new=True), checkpoints.writing(f"free some space, remove {run.path} and import again"):
        if processes.first():
            if beside:  # the run outlives the directory that it came from
                copy = run.tokenizer.absolute() / Path(beside).name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(beside, copy)
                cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(copy)))
            run.write_config(
                cfg,
                {
                    "compute_dtype": session.compute_dtype,
                    "tokenizer": session.tokenizer.fingerprint(),
                    "imported_from": named,
                    "versions": interpreter(),
                },
            )
        processes.require_all(run.appears(), f"see {run.path}; on several hosts it must be a directory that all of them share")
        checkpoints.save(0, {"params": params})
        checkpoints.close()
    held = "INT4 grid" if found.quant.grid != "none" else found.model.dtype
    console.print(
        f"imported {human(sum(s.size for s in session.specs.values()))} weights into {run.path} ({held}, kept in "
        f"{cfg.optim.master_dtype}); train on with: python launch.py train --preset {preset} --run {quote(f'{run.path}-tuned')} "
        f"--train.init-from {quote(str(run.path))}"
    )
    return 0
