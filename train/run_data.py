"""The data of a run, as it was trained on."""

from __future__ import annotations

from typing import Any

from configs.schema import ConfigError
from data.pipeline import PLAN_VERSION, Data, open_data
from train.remix import table_of
from train.run_dir import RunDir
from train.session import Session


def data_of(session: Session, run: RunDir) -> Data:
    """Opened anew, to look at a run. ConfigError if files are no longer the same: rows that were trained on would count as held
    out."""
    facts = run.load_facts()
    data = open_data(session.cfg, session.tokenizer, table_of(facts))
    if session.cfg.data.paths and facts.get("plan_hash", data.plan_hash) != data.plan_hash:
        there = facts.get("plan_version", 1)
        why = (
            "put its files back as they were"
            if there == PLAN_VERSION
            else f"it has data plan {there} and this program plan {PLAN_VERSION}: look at it with the program that trained it"
        )
        raise ConfigError(f"{run.path} may have been trained on rows that are held out now; {why}")
    return data


def require_same_order(run: RunDir, facts: dict[str, Any], data: Data) -> None:
    """ConfigError if a resumed run would see other rows than it was started with."""
    version = facts.get("plan_version", 1)
    if "plan_hash" in facts and version != PLAN_VERSION:
        raise ConfigError(
            f"{run.path} was started with data plan {version}; this program has plan {PLAN_VERSION}, which puts "
            "rows in another order: finish the run with the program that started it, or go on from its "
            f"weights in a new directory with --train.init-from {run.path}"
        )
    if facts.get("plan_hash", data.plan_hash) != data.plan_hash:
        raise ConfigError(
            f"the data of {run.path} has changed since it was started (plan {facts['plan_hash']} -> "
            f"{data.plan_hash}); put the files back, or name a new directory with --run"
        )
