"""What a run starts from: its own newest checkpoint, another run's state or weights, or new ones; and what must fit then."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from rich.box import SIMPLE
from rich.table import Table

from configs.schema import ConfigError, RunConfig, require
from model.transformer import param_specs
from optim.build import check_state
from optim.routing import routing_table
from train import processes
from train.checkpoint import Checkpoints
from train.console import console
from train.machine import Machine
from train.run_dir import RunDir, differences, same_source
from train.session import Session, load_params, parse_source, require_own_tokenizer, say_passed_over
from train.state import TrainState, abstract_state, as_teacher


def kept_dtype(cfg: RunConfig, facts: dict[str, Any]) -> str | None:
    """What a run computes in that goes on: what it was started in, or the run that it forks from, with which it shares its
    first steps. None where the config decides."""
    if not facts and cfg.train.fork_from and cfg.train.compute_dtype == "auto":
        facts = parse_source(cfg.train.fork_from)[0].load_facts()
    return facts.get("compute_dtype")


def require_router_learns(cfg: RunConfig) -> None:
    """ConfigError for a new run whose router would get no gradient but rounding noise, which Muon makes as large as any."""
    require(
        cfg.model.num_experts_per_tok > 1 or not cfg.model.norm_topk_prob or cfg.train.balance_loss > 0,
        "model.num_experts_per_tok=1 with model.norm_topk_prob leaves the router without a gradient, because the gate of a "
        "token's only expert is 1 whatever it says: set model.norm_topk_prob=false, or train.balance_loss above 0",
    )


def begun_as(stored: RunConfig, cfg: RunConfig, run: RunDir) -> RunConfig:
    """`cfg` with what a run that has checkpoints was begun from. ConfigError if it names something else."""
    for field in ("init_from", "fork_from"):
        given, kept = getattr(cfg.train, field), getattr(stored.train, field)
        if given and not (kept and same_source(given, kept)):
            raise ConfigError(
                f"{run.path} goes on from its own checkpoints, not from --train.{field.replace('_', '-')} {given}; leave the "
                "flag out, or name a new directory with --run"
            )
    origin = dict(init_from=stored.train.init_from, fork_from=stored.train.fork_from)
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **origin))


def starting_state(machine: Machine, checkpoints: Checkpoints, run: RunDir) -> tuple[TrainState, int]:
    """Restored, started from another run's weights, or new; says which."""
    session, cfg = machine.session, machine.session.cfg
    like = abstract_state(cfg, session.specs, machine.optimizer, session.mesh)
    if checkpoints.steps():
        restored = checkpoints.restore(like)
        say_passed_over(restored)
        if processes.first():
            checkpoints.set_aside(newer_than=restored.step)
        check_state(restored.state.optimizer, session.specs, cfg.optim)
        console.print(f"resuming {run.path} from step {restored.step} (fingerprints of all arrays agree)")
        return restored.state, restored.step
    if cfg.train.fork_from:
        source, at = parse_source(cfg.train.fork_from)
        require_same_state(source, cfg)
        _require_same_ids(source, session)
        restored = Checkpoints(source.checkpoints).restore(dataclasses.replace(like, teacher={}), at)
        say_passed_over(restored)
        console.print(f"going on from {source.path} at step {restored.step}, whose first steps this run shares")
        return taught(restored.state, session, like), restored.step
    if cfg.quant.distill_weight and not cfg.train.init_from:
        raise ConfigError("quant.distill_weight needs a teacher; name its run with --train.fork-from or --train.init-from")
    if cfg.train.init_from:
        source, at = parse_source(cfg.train.init_from)
        _require_same_shapes(source, session)
        _require_same_ids(source, session)
        Checkpoints(source.checkpoints).candidates(at)  # what is not there is said before the compiler begins
    console.print(routing(session))
    state = machine.new_state()
    if cfg.train.init_from:
        params, at = load_params(session, source, at)
        console.print(f"starting from the weights of {source.path} at step {at}")
        state = taught(dataclasses.replace(state, params=params), session, like)
    return state, 0


def taught(state: TrainState, session: Session, like: TrainState) -> TrainState:
    """The state with a copy of its own weights, as bf16 serves them, for a teacher; as it is in a run without one."""
    if not like.teacher:
        return state
    copy = jax.jit(
        partial(as_teacher, cfg=session.cfg, specs=session.specs),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like.teacher),
    )
    return dataclasses.replace(state, teacher=copy(state.params))


def routing(session: Session) -> Table:
    """Which rule updates which array, printed when a run begins. Names stay whole on a narrow terminal."""
    rows = [route.cells() for route in routing_table(session.specs, session.cfg.optim)]
    schulz = ", ".join({preset for *_, preset, _ in rows if preset})
    table = Table(box=SIMPLE, caption=f"Newton-Schulz: {schulz}" if schulz else None, caption_justify="left")
    for column in ("array", "shape", "matrices", "updated by", "scale"):
        table.add_column(column, no_wrap=column in ("array", "updated by"), overflow="fold", min_width=8)
    for array, shape, matrices, rule, _, scale in rows:
        table.add_row(array, shape, matrices, rule, scale)
    return table


def require_same_state(source: RunDir, cfg: RunConfig) -> None:
    """ConfigError if a forked run has another network than the one it shares its first steps with, or other dtypes."""
    if source.load_facts().get("imported_from"):
        raise ConfigError(f"{source.path} holds imported weights and no optimizer state; take them with --train.init-from")
    changed = [d for d in differences(source.load_config(), cfg) if d.startswith("model.")]
    if changed:
        raise ConfigError(
            f"{source.path} holds another model ({'; '.join(changed)}), with which a fork shares its first steps; "
            "leave these fields out"
        )
    theirs = source.load_config().optim
    for field in ("matrices", "master_dtype", "momentum_dtype"):
        if (there := getattr(theirs, field)) != (here := getattr(cfg.optim, field)):
            raise ConfigError(
                f"{source.path} has optim.{field} {there}, not {here}, and a fork goes on with its state; set "
                f"--optim.{field.replace('_', '-')} {there}, or take its weights with --train.init-from"
            )


def _require_same_shapes(source: RunDir, session: Session) -> None:
    """ConfigError if a run's weights have other shapes. What else its network has (positions, rope, ids) may be set anew."""
    theirs = {path: list(spec.shape) for path, spec in param_specs(source.load_config().model).items()}
    for path, spec in session.specs.items():
        if (there := theirs.get(path, "missing")) != (here := list(spec.shape)):
            raise ConfigError(
                f"{path} is {here} here and {there} in {source.path}; leave out the --model fields that change "
                "shapes: a run that starts from weights takes its network from there"
            )


def _require_same_ids(source: RunDir, session: Session) -> None:
    """ConfigError if the tokenizer that came with a run's weights has changed. Another one may be named."""
    if session.cfg.data.tokenizer == source.load_config().data.tokenizer:
        require_own_tokenizer(source, session.tokenizer)
