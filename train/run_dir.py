"""A run is a directory: config.json, metrics.jsonl, checkpoints/, tokenizer/ of an import, export/, report.md."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, get_args

from configs.schema import (
    ConfigError,
    DataConfig,
    Dtype,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)

SECTIONS = {
    "model": ModelConfig,
    "optim": OptimConfig,
    "quant": QuantConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "profile": ProfileConfig,
}

MAY_CHANGE = {
    "mesh",
    "profile",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep",
    "train.steps",
    "train.remat",
    "train.layers",
    "train.accumulate",
    "train.transport",
    "train.init_from",
    "train.fork_from",
}
"""What a resumed run may set anew: where and how it runs, how long, what it prints. The rest would change what is trained."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems say that know no locks."""


def _is_table(value: Any) -> bool:
    """Whether it is a table of mixtures as train/remix.py keeps it."""
    return isinstance(value, list) and all(
        isinstance(row, list)
        and len(row) == 2
        and type(row[0]) is int
        and isinstance(row[1], list)
        and all(isinstance(weight, int | float) for weight in row[1])
        for row in value
    )


FACTS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "hash": lambda value: isinstance(value, str),
    "compute_dtype": lambda value: value in get_args(Dtype),
    "tokenizer": lambda value: isinstance(value, str),
    "mixtures": _is_table,
    "devices": lambda value: type(value) is int and value >= 1,
}
"""What those facts of config.json look like that decide how a run goes on and is looked at. The first two are always there."""


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The inverse of `to_dict`."""
    sections = {}
    for name, section in SECTIONS.items():
        types = {f.name for f in dataclasses.fields(section)}
        unknown = set(values[name]) - types
        if unknown:
            raise ConfigError(f"config.json has unknown fields {sorted(unknown)} in {name}; it was written by another version")
        sections[name] = section(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[name].items()})
    return RunConfig(**sections)


def config_hash(cfg: RunConfig) -> str:
    """12 hex digits over the whole resolved config."""
    return _hash(to_dict(cfg))


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`section.field: old -> new` for every field that differs and may not."""
    out = []
    for section, fields in to_dict(old).items():
        for name, value in fields.items():
            other = to_dict(new)[section][name]
            if value != other and section not in MAY_CHANGE and f"{section}.{name}" not in MAY_CHANGE:
                out.append(f"{section}.{name}: {value} -> {other}")
    return out


class RunDir:
    """Paths and the small files of a run."""

    def __init__(self, path: str | Path):
        if "://" in str(path):
            raise ConfigError(f"{path}: runs are written to directories; mount the bucket and give its path")
        self.path = Path(path)

    def appears(self) -> bool:
        """Whether there is a run here, within a minute: network file systems are slow to show what another host wrote."""
        deadline = time.monotonic() + 60
        while not self.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        return self.exists()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer that came with imported weights."""
        return self.path / "tokenizer"

    @property
    def left_out(self) -> Path:
        """Rows of the data that are not trained on, and why."""
        return self.path / "left_out.txt"

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def lock(self) -> TextIO | None:
        """Holds the run for whoever writes it, until the file is closed or the process dies; None where another one does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"{self.path} is no directory; name another with --run") from None
        file = open(self.path / ".lock", "a")  # noqa: SIM115  (open is what locks; some file systems want it writable)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                if not isinstance(error, BlockingIOError):
                    raise
                return None
        return file

    def load_facts(self) -> dict[str, Any]:
        """What config.json says: the config, where and on what the run was started, and the hash of all this, or in an older run
        of the config only."""
        file = self.path / "config.json"
        if not file.exists():
            raise ConfigError(
                f"{self.path} is not a run directory: it has no config.json; train there first, or name another with --run"
            )
        try:
            facts = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            raise ConfigError(f"{file} is not JSON ({error}); restore it from a copy") from error
        if not isinstance(facts, dict):
            raise ConfigError(f"{file} holds no JSON object; restore it from a copy")
        if "model_type" in facts:
            raise ConfigError(
                f"{self.path} is a Hugging Face directory, not a run; import it first: python launch.py import "
                f"{self.path} --run runs/NEW"
            )
        known = {"config": None, "hash": None} | facts
        if wrong := next((name for name, fits in FACTS.items() if name in known and not fits(known[name])), None):
            raise ConfigError(f"{file} is not a run's config ({wrong} is missing or something else); restore it from a copy")
        others = {name: value for name, value in facts.items() if name != "hash"}
        if facts["hash"] not in (_hash(others), _hash(facts["config"])):
            raise ConfigError(
                f"{file} was damaged or edited, what it says has another hash than it gives; restore it from a copy, and change "
                "settings by flags"
            )
        return facts

    def load_config(self) -> RunConfig:
        """The config the run was started with; a tokenizer that lies in the directory is found wherever that was moved."""
        facts = self.load_facts()
        try:
            cfg = from_dict(facts["config"])
            own = self.tokenizer.absolute() / Path(cfg.data.tokenizer).name
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path / 'config.json'} is not a run's config ({error}); restore it from a copy") from error
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(own))) if own.is_file() else cfg

    def step_before_grid(self) -> int:
        """The checkpoint at quant.start_step: the last state that no grid has touched."""
        start = self.load_config().quant.start_step
        if start == 0:
            raise ConfigError(f"{self.path} had its experts on the grid from the first step; there is nothing before it")
        return start

    def write_config(self, cfg: RunConfig, facts: dict[str, Any]) -> None:
        """Resolved config, facts about where it ran and the hash of both; written whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        said = {"config": to_dict(cfg), **facts}
        body = {"hash": _hash(said), **said}
        temporary = self.path / "config.json.new"
        temporary.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(temporary, self.path / "config.json")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's record; a step that was run again after a restart counts once, the last time. Lines that a kill cut in
        half or the disk damaged are left out."""
        if not self.metrics.exists():
            return []
        rows: dict[tuple, dict] = {}
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("step"), int):
                rows[row["kind"], row["step"]] = row
        return sorted(rows.values(), key=lambda r: r["step"])


def split_source(source: str) -> tuple[RunDir, str]:
    """The run of RUN[@STEP], and STEP or "". A run's own name may have an @, and what is there decides: `x@5` is the run of that
    name, not step 5 of `x`, where only the first is a run. ConfigError for `x@` where no directory has that name."""
    path, at, step = source.rpartition("@")
    if at and not step and not Path(source).is_dir():
        raise ConfigError(f"{source} ends without a step; write {path}@STEP, {path}@grid, or {path} for the newest step")
    stepped = bool(at) and (step == "grid" or step.isdecimal())
    if not at or not step or (RunDir(source).exists() and not (stepped and RunDir(path).exists())):
        return RunDir(source), ""
    return RunDir(path), step


def with_origin_of(base: RunConfig, run: str | None) -> RunConfig:
    """`base` with what the run was begun from, if it is there and has a checkpoint: a preset may name something else."""
    here = RunDir(run) if run else None
    if not here or not here.exists() or not (here.checkpoints.is_dir() and any(here.checkpoints.iterdir())):
        return base
    begun = here.load_config().train
    return dataclasses.replace(base, train=dataclasses.replace(base.train, init_from=begun.init_from, fork_from=begun.fork_from))


def same_source(one: str, other: str) -> bool:
    """Whether two RUN[@STEP] mean one run and one step, however its path is written."""
    (run, step), (run_too, step_too) = map(split_source, (one, other))
    return step == step_too and run.path.resolve() == run_too.path.resolve()


def with_network_of(base: RunConfig, run: str | None, source: str) -> RunConfig:
    """`base` with the model and the tokenizer of the run RUN[@STEP] whose weights are gone on from, or of `run` itself once it
    is there: weights come with their network, and their ids with a tokenizer."""
    here = RunDir(run) if run else None
    known = here if here and here.exists() else split_source(source)[0]
    if not known.exists():
        return base
    theirs = known.load_config()
    data = dataclasses.replace(base.data, tokenizer=theirs.data.tokenizer)
    return dataclasses.replace(base, model=theirs.model, data=data)
