"""Changing data.mixture of a run under way: asked for by a flag, recorded in config.json, part of the plan from then on.

The order of the rows is a pure function of all mixtures a run has had and of the steps at which they changed
(data/mixture.py); config.json keeps that table under `mixtures`: [[step until which it held, weights], ...].
"""

from __future__ import annotations

import dataclasses
from typing import Any

from configs.schema import RunConfig, require
from train.run_dir import differences

Table = list[tuple[int, tuple[float, ...]]]


def table_of(facts: dict[str, Any]) -> Table:
    """The mixtures that a run had before its present one."""
    return [(int(step), tuple(weights)) for step, weights in facts.get("mixtures", ())]


def edited(table: Table, mixture: tuple[float, ...], step: int) -> Table:
    """The table of a run whose present mixture is `mixture` when another one takes over after `step`: what came later, in steps
    that are lost, is forgotten."""
    held = next((weights for until, weights in table if until > step), mixture)
    kept = [row for row in table if row[0] <= step]
    return kept if kept and kept[-1][0] == step else [*kept, (step, held)]


def forked(facts: dict[str, Any], old: RunConfig, cfg: RunConfig, step: int) -> Table:
    """The table of a new run that goes on from `step` of one with these facts and config: where both take the same rows at a time
    from the same sources, what the old one had until then, so that the new one goes on in its order; else none."""

    def rows(of: RunConfig) -> tuple:
        return dataclasses.replace(of.data, mixture=()), of.train.batch_size, of.train.seq_len

    if not (old.data.mixture and cfg.data.mixture) or rows(old) != rows(cfg):
        return []
    table = edited(table_of(facts), old.data.mixture, step)
    return table[:-1] if table[-1] == (step, cfg.data.mixture) else table


def before_edit(old: RunConfig, cfg: RunConfig, remix: bool) -> RunConfig:
    """The config under which the run's data was opened last: `cfg` with the run's own mixture. ConfigError for every
    change that a resumed run may not make, and for a new mixture without `remix`."""
    same = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, mixture=old.data.mixture)) if remix else cfg
    changed = differences(old, same)
    hint = "; a new data.mixture needs --remix" if any(d.startswith("data.mixture") for d in changed) else ""
    require(
        not changed,
        f"the run was trained with another config ({'; '.join(changed)}); set these back, or name a new "
        f"directory with --run{hint}",
    )
    edited = old.data.mixture != cfg.data.mixture
    require(
        not edited or bool(old.data.mixture and cfg.data.mixture),
        "--remix changes the weights of a data.mixture; a run that began without one keeps taking everything once an epoch",
    )
    return same
