"""The training loop: start or resume a run directory, step, record, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import jax

from configs.schema import ConfigError, RunConfig, require
from data.pipeline import PLAN_VERSION, Data, open_data
from quant.coverage import coverage
from train import processes
from train.checkpoint import Checkpoints
from train.compat import compile_seconds, interpreter, keep_freed_memory, slowed_kernels
from train.console import Bar, clock, console, human
from train.counts import train_flops_per_token
from train.held_out import Evaluator
from train.machine import Machine, build
from train.mesh import batch_sharding
from train.profile import Profile
from train.recorder import Recorder
from train.remix import Table, before_edit, edited, forked, table_of
from train.run_data import require_same_order
from train.run_dir import RunDir, config_hash, split_source
from train.session import Session, open_session, parse_source
from train.start import begun_as, kept_dtype, require_router_learns, starting_state
from train.state import TrainState
from train.stop import EXIT_DONE, EXIT_STOPPED, StopSignal


def train(cfg: RunConfig, run: RunDir, remix: bool = False) -> int:
    """Train to cfg.train.steps in a run directory, from its newest sound checkpoint if it has one. Exit code. `remix`
    lets a resumed run go on with another data.mixture (train/remix.py).

    Everything that can be wrong with the command is found before anything is written.
    """
    started, compiling = time.monotonic(), compile_seconds()
    facts = run.load_facts() if run.exists() else {}
    if not facts and Checkpoints(run.checkpoints).steps():
        raise ConfigError(f"{run.path} holds checkpoints but no config.json; restore it, or name a new directory with --run")
    if facts.get("imported_from"):
        raise ConfigError(
            f"{run.path} holds imported weights; name a new directory with --run and start there with "
            f"--train.init-from {run.path}"
        )
    if facts and Checkpoints(run.checkpoints).steps():
        cfg = begun_as(run.load_config(), cfg, run)
    if not facts:
        require_router_learns(cfg)
    known = before_edit(run.load_config(), cfg, remix) if facts else cfg.checked()
    session = open_session(cfg, kept_dtype(cfg, facts))
    if session.platform == "cpu":
        keep_freed_memory()
    if slowed := slowed_kernels(session.platform):
        console.print(slowed, style="yellow", markup=False)
    mixtures = table_of(facts)
    data = open_data(known, session.tokenizer, mixtures)
    require_same_order(run, facts, data)
    machine = build(session)
    landmarks = (cfg.quant.start_step,) if cfg.quant.grid != "none" and cfg.quant.start_step else ()
    checkpoints = Checkpoints(run.checkpoints, cfg.train.keep, landmarks)
    with ExitStack() as held:
        if facts:  # a restart may put damaged checkpoints aside; nothing of a new run is there before it is announced
            held.enter_context(processes.alone(run))
        state, step = starting_state(machine, checkpoints, run)
        # A late process must not find the files of an early one.
        processes.require_same("the run's settings, data and step", config_hash(cfg), data.plan_hash, step)
        if step >= cfg.train.steps:
            require(bool(facts), f"{cfg.train.fork_from} is at step {step}, so there is nothing to do; raise --train.steps")
            console.print(f"already trained to step {step}; raise --train.steps to go on")
            return EXIT_DONE
        if known.data.mixture != cfg.data.mixture:
            mixtures = edited(mixtures, known.data.mixture, step)
            data = open_data(cfg, session.tokenizer, mixtures)
            console.print(f"mixture {mixtures[-1][1]} until step {step}, {cfg.data.mixture} from there on")
        if not facts and cfg.train.fork_from:
            source, _ = parse_source(cfg.train.fork_from)
            if mixtures := forked(source.load_facts(), source.load_config(), cfg, step):
                data = open_data(cfg, session.tokenizer, mixtures)
                console.print(f"the mixtures of {source.path} until step {step}, {cfg.data.mixture} from there on")
        if not facts:
            held.enter_context(processes.alone(run, new=True))
        _announce(run, session, data, mixtures, step)
        with checkpoints.writing(), StopSignal() as stop:  # what is being saved at the end is waited for under it too
            try:
                state, step = run_steps(machine, data, state, step, checkpoints, run, stop, started, compiling)
            except Exception as error:
                if not processes.lost_another(error):  # all of them finish what they were saving, or none can
                    checkpoints.close()
                raise
            checkpoints.close()
    if stop.requested:
        left = "the same command goes on from there" if step < cfg.train.steps else "nothing is left to train"
        console.print(f"stopped by {stop.requested} after step {step}, saved; {left}")
        return EXIT_STOPPED
    console.print(f"trained to step {step} in {clock(time.monotonic() - started)}")
    return EXIT_DONE


def _announce(run: RunDir, session: Session, data: Data, mixtures: Table, step: int) -> None:
    """Write what the run is into its directory, and print what will be trained on what."""
    cfg = session.cfg
    if processes.first():
        run.write_config(
            cfg,
            {
                "compute_dtype": session.compute_dtype,
                "tokenizer": session.tokenizer.fingerprint(),
                "plan_hash": data.plan_hash,
                "plan_version": PLAN_VERSION,
                "mixtures": mixtures,
                "platform": session.platform,
                "device": jax.devices()[0].device_kind,
                "devices": jax.device_count(),
                "versions": interpreter(),
                "flops_per_token": train_flops_per_token(cfg.model, session.specs, cfg.train.seq_len),
            },
        )
    processes.require_all(
        run.appears(),
        f"see {run.path}, which the first one has just written: on several hosts it must be a directory that all of them share",
    )
    if data.account.rejected and processes.first():
        run.left_out.write_text("\n".join(data.account.rejected) + "\n")
        console.print(f"[yellow]{len(data.account.rejected)} rows or files are left out[/]: {run.left_out} says which and why")
    if data.account.remarks and processes.first():
        console.print(
            f"[yellow]{len(data.account.remarks)} remarks on conversations that are trained[/]: `launch.py data` with "
            "the same settings shows them"
        )
    console.print(
        f"run {run.path} (config {config_hash(cfg)}), data: " + ", ".join(f"{k} {v}" for k, v in data.describe().items())
    )
    if cfg.data.validation_fraction > 0 and not data.holds_out:
        console.print(
            "[yellow]nothing is held out, so there will be no held-out loss[/]: of every source the last documents are, and none "
            "has enough of them; an index of whole texts (launch.py data --index) has each as one document"
        )
    if cfg.quant.grid != "none":
        console.print(str(coverage(session.specs, cfg.quant)), markup=False)
        if cfg.quant.start_step >= cfg.train.steps:
            console.print(
                f"[yellow]no step trains the experts on the grid[/]: it begins at step {cfg.quant.start_step} and the "
                f"run ends at {cfg.train.steps}; set --quant.start-step lower"
            )
    console.print(
        f"{human(sum(s.size for s in session.specs.values()))} parameters on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, compute in {session.compute_dtype}, {cfg.train.steps - step} steps of "
        f"{human(cfg.train.batch_size * cfg.train.seq_len)} tokens to do"
    )


def run_steps(
    machine: Machine,
    data: Data,
    state: TrainState,
    step: int,
    checkpoints: Checkpoints,
    run: RunDir,
    stop: StopSignal,
    started: float,
    compiling: Callable[[], float],
) -> tuple[TrainState, int]:
    """Steps until the end or a signal; the last one is saved either way."""
    cfg, sharding = machine.session.cfg, batch_sharding(machine.session.mesh)
    rows = processes.my_rows(sharding, cfg.train.batch_size, cfg.train.seq_len)
    evaluator = Evaluator(machine.session, data)
    recorder = Recorder(machine.session, run, step + 1, started, compiling, last_data_hash(run, step, cfg.train.fork_from))
    profile = Profile(cfg.profile.bounds(), run.profile)
    grid_watch = machine.grid_watch
    sample_every = max(cfg.train.log_every, cfg.train.steps // 20)
    with Bar(f"training {run.path}", cfg.train.steps - step) as bar:
        for batch in data.iterate(step, rows):
            placed = processes.place(batch, sharding, rows, cfg.train.batch_size)
            reported = step + 1 in (recorder.first_step, cfg.train.steps) or (step + 1) % cfg.train.log_every == 0
            if reported:
                grid_watch.before(state.params)
            if step + 1 == recorder.first_step or step == machine.settles_at:
                with recorder.apart(), bar.apart():  # the compiler's time is no step's
                    machine.lower(step).compile()
            if profile.begins(step + 1):
                with recorder.apart():
                    profile.start(step + 1, state)
            state, metrics = machine.train_step(step, state, placed)
            step += 1
            last = step >= cfg.train.steps
            recorder.record(step, metrics)
            stopping = stop.after(step)
            if profile.ends(step, last or stopping):
                with recorder.apart():
                    profile.stop(step, state)
            if step % sample_every == 0:
                recorder.measure_optimizer(machine.time_update, state)
            if reported:
                recorder.report(grid_watch.report(state.params))
            if last or stopping or step in checkpoints.landmarks or step % cfg.train.checkpoint_every == 0:
                recorder.catch_up()
                with recorder.apart():
                    checkpoints.save(step, state)
            if data.holds_out and (last or (cfg.train.eval_every and step % cfg.train.eval_every == 0)):
                with recorder.apart():
                    amount = float(metrics["grid_amount"])
                    recorder.evaluated(step, evaluator(state.params, amount=amount, batches=cfg.train.eval_batches))
            bar.advance()
            if last or stopping:
                break
    recorder.close()
    return state, step


def last_data_hash(run: RunDir, step: int, fork_from: str | None) -> str:
    """The rolling hash of all batches up to a step, from metrics.jsonl of the run or of the one that it shares its first steps
    with: two runs with equal hashes saw equal data."""

    def found(where: RunDir) -> list[str]:
        return [r.get("data_hash", "") for r in where.read_metrics() if r["kind"] == "step" and r["step"] == step]

    hashes = found(run) or (found(split_source(fork_from)[0]) if fork_from else [])
    return hashes[-1] if hashes else ""
