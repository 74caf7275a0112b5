"""The training loop: start or resume a run directory, step, record, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.param_spec import Specs
from configs.schema import ConfigError, RunConfig
from data.pipeline import Data, batch_hash, open_data
from model.counts import train_flops_per_token
from optim.build import build_optimizer, check_state
from optim.schedules import learning_rate
from quant.coverage import coverage, require_whole_groups
from quant.error import grid_error
from quant.metrics import code_flow, start_history
from train.checkpoint import Checkpoints
from train.compat import interpreter
from train.console import Bar, clock, console, human
from train.held_out import Evaluator
from train.mesh import batch_sharding, param_shardings
from train.metrics import MetricsFile, peak_flops
from train.run_dir import RunDir, config_hash, differences
from train.session import Session, load_params, open_session, parse_source
from train.state import TrainState, initial_state, state_shardings
from train.step import StepConfig, make_train_step
from train.stop import EXIT_DONE, EXIT_STOPPED, StopSignal


@dataclass
class Machine:
    """The compiled pieces of a run."""

    session: Session
    optimizer: Any
    schedule: Callable
    train_step: Callable
    time_update: Callable[[TrainState], float]


def build(session: Session) -> Machine:
    """Optimizer and compiled step for a session."""
    cfg = session.cfg
    shardings = param_shardings(session.specs, session.mesh)
    coverage(session.specs, cfg.quant)
    require_whole_groups(session.specs, shardings, cfg.quant)
    optimizer = build_optimizer(session.specs, cfg.optim, cfg.train.steps, mesh=session.mesh, shardings=shardings)
    schedule = learning_rate(cfg.optim, cfg.train.steps)
    step = make_train_step(StepConfig(cfg, session.compute_dtype, session.platform), session.specs, optimizer, schedule)
    out = jax.tree.map(lambda leaf: leaf.sharding, state_shardings(cfg, session.specs, optimizer, session.mesh))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(out, None))

    @jax.jit
    def update_only(state):
        """The optimizer's share of a step by itself; the parameters stand in for a gradient."""
        logits = jnp.zeros((cfg.model.num_hidden_layers, cfg.model.num_attention_heads))
        counts = jnp.ones((cfg.model.num_moe_layers, cfg.model.n_routed_experts))
        return optimizer.update(state.params, state.optimizer, state.params, max_logits=logits, expert_counts=counts)[0]

    def time_update(state) -> float:
        jax.block_until_ready(update_only(state))
        start = time.perf_counter()
        jax.block_until_ready(update_only(state))
        return time.perf_counter() - start

    return Machine(session, optimizer, schedule, compiled, time_update)


def train(cfg: RunConfig, run: RunDir) -> int:
    """Train to cfg.train.steps in a run directory, from its newest sound checkpoint if it has one. Exit code.

    Everything that can be wrong with the command is found before anything is written.
    """
    started = time.monotonic()
    facts = {}
    if run.exists():
        facts = run.load_facts()
        changed = differences(run.load_config(), cfg)
        if changed:
            raise ConfigError(f"{run.path} was trained with another config ({'; '.join(changed)}); "
                              f"set these back, or name a new directory with --run")
    session = open_session(cfg, facts.get("compute_dtype"))
    data = open_data(cfg, session.tokenizer)
    if facts.get("plan_hash", data.plan_hash) != data.plan_hash:
        raise ConfigError(f"the data of {run.path} has changed since it was started (plan {facts['plan_hash']} -> "
                          f"{data.plan_hash}); put the files back, or name a new directory with --run")
    machine = build(session)
    landmarks = (cfg.quant.start_step,) if cfg.quant.grid != "none" and cfg.quant.start_step else ()
    checkpoints = Checkpoints(run.checkpoints, cfg.train.keep, landmarks)
    state, step = starting_state(machine, checkpoints, run)
    run.write_config(cfg, {"compute_dtype": session.compute_dtype, "plan_hash": data.plan_hash,
                           "platform": session.platform, "device": jax.devices()[0].device_kind,
                           "devices": jax.device_count(), "versions": interpreter(),
                           "flops_per_token": train_flops_per_token(cfg.model, session.specs, cfg.train.seq_len)})
    console.print(f"run {run.path} (config {config_hash(cfg)}), data: "
                  + ", ".join(f"{k} {v}" for k, v in data.describe().items()))
    console.print(f"{human(sum(s.size for s in session.specs.values()))} parameters on {jax.device_count()} x "
                  f"{jax.devices()[0].device_kind}, compute in {session.compute_dtype}, {cfg.train.steps - step} steps of "
                  f"{human(cfg.train.batch_size * cfg.train.seq_len)} tokens to do")
    if step >= cfg.train.steps:
        console.print(f"already trained to step {step}; raise --train.steps to go on")
        return EXIT_DONE
    with StopSignal() as stop:
        state, step = run_steps(machine, data, state, step, checkpoints, run, stop, started)
    checkpoints.close()
    if stop.requested:
        console.print(f"stopped by {stop.requested} after step {step}, saved; the same command goes on from there")
        return EXIT_STOPPED
    console.print(f"trained to step {step} in {clock(time.monotonic() - started)}")
    return EXIT_DONE


def starting_state(machine: Machine, checkpoints: Checkpoints, run: RunDir) -> tuple[TrainState, int]:
    """Restored, started from another run's weights, or new; says which."""
    session = machine.session
    cfg = session.cfg
    like = state_shardings(cfg, session.specs, machine.optimizer, session.mesh)
    if checkpoints.steps():
        restored = checkpoints.restore(like)
        for sentence in restored.damaged:
            console.print(f"[yellow]{sentence}[/]; going back to step {restored.step}")
        checkpoints.set_aside(newer_than=restored.step)
        check_state(restored.state.optimizer, session.specs, cfg.optim)
        console.print(f"resuming {run.path} from step {restored.step} (fingerprints of all arrays agree)")
        return restored.state, restored.step
    if cfg.train.fork_from:
        source, at = _same_model(cfg.train.fork_from, cfg)
        restored = Checkpoints(source.checkpoints).restore(like, at)
        console.print(f"going on from {source.path} at step {restored.step}, whose first steps this run shares")
        return restored.state, restored.step
    state = initial_state(cfg, session.specs, machine.optimizer, session.mesh)
    if cfg.train.init_from:
        source, at = _same_model(cfg.train.init_from, cfg)
        params, at = load_params(session, source, at)
        console.print(f"starting from the weights of {source.path} at step {at}")
        state = TrainState(params, state.optimizer, state.step, state.skipped)
    return state, 0


def _same_model(source: str, cfg: RunConfig) -> tuple[RunDir, int | None]:
    """Run and step of RUN[@STEP]; an error if it holds another network."""
    run, step = parse_source(source)
    changed = [d for d in differences(run.load_config(), cfg) if d.startswith("model.")]
    if changed:
        raise ConfigError(f"{run.path} holds another model ({'; '.join(changed)}); its weights do not fit")
    return run, step


def run_steps(machine: Machine, data: Data, state: TrainState, step: int, checkpoints: Checkpoints, run: RunDir,
              stop: StopSignal, started: float) -> tuple[TrainState, int]:
    """Steps until the end or a signal; the last one is saved either way."""
    cfg, sharding = machine.session.cfg, batch_sharding(machine.session.mesh)
    evaluator = Evaluator(machine.session, data)
    recorder = Recorder(machine, run, step + 1, started)
    codes = GridWatch(machine.session.specs, cfg.quant.group_size)
    sample_every = max(cfg.train.log_every, cfg.train.steps // 20)
    history = last_data_hash(run, step)
    with Bar(f"training {run.path}", cfg.train.steps - step) as bar:
        for batch in data.iterate(step):
            history = batch_hash(batch, history)
            state, metrics = machine.train_step(state, jax.device_put(batch, sharding))
            step += 1
            last = step >= cfg.train.steps
            recorder.record(step, {**metrics, "data_hash": history})
            if step % sample_every == 0:
                recorder.measure_optimizer(state)
            if step == recorder.first_step or step % cfg.train.log_every == 0 or last:
                recorder.report(codes.report(step, state.params))
            if last or (cfg.train.eval_every and step % cfg.train.eval_every == 0):
                amount = float(metrics["grid_amount"])
                recorder.evaluated(step, evaluator(state.params, amount=amount, batches=cfg.train.eval_batches))
            if last or stop.requested or step in checkpoints.landmarks or step % cfg.train.checkpoint_every == 0:
                checkpoints.save(step, state)
                recorder.restart_clock()
            bar.advance()
            if last or stop.requested:
                break
    recorder.close()
    return state, step


def last_data_hash(run: RunDir, step: int) -> str:
    """The rolling hash of all batches up to a step, from metrics.jsonl: two runs with equal hashes saw equal data."""
    rows = [r for r in run.read_metrics() if r["kind"] == "step" and r["step"] == step]
    return rows[-1].get("data_hash", "") if rows else ""


class GridWatch:
    """Distance of the masters from the grid, and how codes move between two reports.

    Movement is followed in the first MoE layer only: it needs two bytes per weight. Two reports that are many steps
    apart miss codes that moved and came back in between, so the share is per report, with the steps beside it.
    """

    def __init__(self, specs: Specs, group: int):
        self.specs, self.group = specs, group
        self.history, self.at = None, 0
        self._start = jax.jit(partial(start_history, specs=specs, group=group))
        self._flow = jax.jit(partial(code_flow, specs=specs, group=group), donate_argnums=0)

    def report(self, step: int, params: dict[str, Any]) -> dict[str, Any]:
        """grid_error and codes_at_edge; from the second report on, quant/flipped, quant/oscillating, quant/steps."""
        out = grid_error(params, self.specs, self.group)
        layer = {path: params[path][:1] for path, spec in self.specs.items() if spec.on_grid}
        if self.history is None:
            self.history = self._start(layer)
        else:
            self.history, moved = self._flow(self.history, layer)
            out |= moved | {"quant/steps": step - self.at}
        self.at = step
        return out


class Recorder:
    """Writes a step's metrics while the next one already computes, and prints a line every log_every steps."""

    def __init__(self, machine: Machine, run: RunDir, first_step: int, started: float):
        self.machine, self.session = machine, machine.session
        self.first_step, self.started = first_step, started
        self.file = MetricsFile(run.metrics)
        cfg = self.session.cfg
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.flops_per_token = train_flops_per_token(cfg.model, self.session.specs, cfg.train.seq_len)
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last step is not the next one's time."""
        self._settle()
        self.clock = time.perf_counter()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """A step was started; the one before it is finished, written and forgotten."""
        self._write()
        self.pending = (step, metrics)

    def measure_optimizer(self, state: TrainState) -> None:
        """Time the update by itself."""
        self._settle()
        self.pending[1]["optimizer_seconds"] = self.machine.time_update(state)
        self.clock = time.perf_counter()

    def report(self, extra: dict[str, Any]) -> None:
        """Write and print the step that was just started, with measurements that are not taken every step."""
        self._settle()
        step, metrics = self.pending
        self.pending = (step, {**metrics, **jax.device_get(extra)})
        row = self._write()
        self._print(step, row)
        self.clock = time.perf_counter()

    def _settle(self) -> None:
        """Wait for the pending step and note how long it took."""
        if self.pending and "seconds" not in self.pending[1]:
            jax.block_until_ready(self.pending[1]["loss"])
            now = time.perf_counter()
            self.pending[1]["seconds"] = now - self.clock
            self.clock = now

    def _write(self) -> dict[str, Any]:
        if self.pending is None:
            return {}
        self._settle()
        step, metrics = self.pending
        self.pending = None
        values = jax.device_get(metrics)  # text passes through
        rate = float(values["tokens"]) / values["seconds"]
        row = {"loss": values.pop("loss"), "tokens_per_second": rate,
               "mfu": rate * self.flops_per_token / self.peak if self.peak else "n/a", **values}
        if step == self.first_step:
            row["seconds_to_first_step"] = time.monotonic() - self.started
        if "grid_error" not in row:
            row.pop("expert_load")  # large; kept where a line is printed
        self.file.write("step", step, row)
        return row

    def _print(self, step: int, row: dict[str, Any]) -> None:
        first = f"  (first step after {row['seconds_to_first_step']:.0f} s)" if "seconds_to_first_step" in row else ""
        console.print(f"step {step:>5}/{self.session.cfg.train.steps}  loss {float(row['loss']):.4f}  "
                      f"{human(row['tokens_per_second'])} tok/s  load max/mean "
                      f"{float(np.max(row['load_max_over_mean'])):.2f}  max logit {float(row['max_logit']):.1f}  "
                      f"grid error {float(row['grid_error']):.3f}{first}")

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.file.write("eval", step, values)
        console.print("  held out: " + "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items()))
        self.clock = time.perf_counter()

    def close(self) -> None:
        self._write()
        self.file.close()
