"""A run is a directory: config.json, metrics.jsonl, checkpoints/, export/, report.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from configs.schema import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)

SECTIONS = {"model": ModelConfig, "optim": OptimConfig, "quant": QuantConfig, "data": DataConfig, "train": TrainConfig,
            "mesh": MeshConfig, "profile": ProfileConfig}

MAY_CHANGE = {"mesh", "profile", "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every",
              "train.keep", "train.steps", "train.remat", "train.layers", "train.accumulate", "train.transport",
              "train.init_from", "train.fork_from"}
"""What a resumed run may set anew: where and how it runs, how long, what it prints. The rest would change what is trained."""


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
    return hashlib.sha256(json.dumps(to_dict(cfg), sort_keys=True).encode()).hexdigest()[:12]


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
    def left_out(self) -> Path:
        """Rows of the data that are not trained on, and why."""
        return self.path / "left_out.txt"

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def load_facts(self) -> dict[str, Any]:
        """What config.json says: the config, its hash, and where and on what the run was started."""
        file = self.path / "config.json"
        if not file.exists():
            raise ConfigError(f"{self.path} is not a run directory: it has no config.json; train there first, "
                              f"or name another with --run")
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} is not JSON ({error}); restore it from a copy") from error

    def load_config(self) -> RunConfig:
        """The config the run was started with."""
        facts = self.load_facts()
        if "model_type" in facts:
            raise ConfigError(f"{self.path} is a Hugging Face directory, not a run; import it first: python launch.py import "
                              f"{self.path} --run runs/NEW")
        try:
            return from_dict(facts["config"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{self.path / 'config.json'} is not a run's config ({error}); restore it from a copy") from error

    def step_before_grid(self) -> int:
        """The checkpoint at quant.start_step: the last state that no grid has touched."""
        start = self.load_config().quant.start_step
        if start == 0:
            raise ConfigError(f"{self.path} had its experts on the grid from the first step; there is nothing before it")
        return start

    def write_config(self, cfg: RunConfig, facts: dict[str, Any]) -> None:
        """Resolved config, its hash and facts about where it ran; written whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        body = {"config": to_dict(cfg), "hash": config_hash(cfg), **facts}
        temporary = self.path / "config.json.new"
        temporary.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(temporary, self.path / "config.json")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's record; a step that was run again after a restart counts once, the last time."""
        if not self.metrics.exists():
            return []
        rows: dict[tuple, dict] = {}
        for line in self.metrics.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a kill cut in half
            rows[(row.get("kind", "step"), row["step"])] = row
        return sorted(rows.values(), key=lambda r: r["step"])


def with_network_of(base: RunConfig, run: str | None, source: str) -> RunConfig:
    """`base` with the model and the tokenizer of the run RUN[@STEP] whose weights are gone on from, or of `run` itself once it
    is there: weights come with their network, and their ids with a tokenizer."""
    known = next((found for found in map(RunDir, filter(None, (run, source.partition("@")[0]))) if found.exists()), None)
    if known is None:
        return base
    theirs = known.load_config()
    data = dataclasses.replace(base.data, tokenizer=theirs.data.tokenizer)
    return dataclasses.replace(base, model=theirs.model, data=data)
