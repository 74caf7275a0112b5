"""The compiled pieces of a run, and its first state."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from train import processes
from train.compat import known_options
from train.compiler_options import step_options
from train.console import console
from train.grid_watch import GridWatch
from train.program import step_program
from train.session import Session
from train.state import TrainState, initial_program
from train.step import Batch, abstract_batch


@dataclass
class Machine:
    """The compiled pieces of a run.

    train_step   takes the number of the step before state and batch
    lower        the program of a step, ready for the compiler; once compiled, a call of train_step finds it
    settles_at   the step from which on train_step calls another program than before (train/program.py)
    time_update  seconds of an optimizer's update by itself
    grid_watch   what a reported step says of the grid; it remembers one run's codes
    """

    session: Session
    optimizer: Any
    train_step: Callable[[int, TrainState, Batch], tuple[TrainState, dict]]
    lower: Callable[[int], Lowered]
    settles_at: int | None
    time_update: Callable[[TrainState], float]
    grid_watch: GridWatch

    def new_state(self) -> TrainState:
        """Random weights and a fresh optimizer.

        On a CPU the generators of weights are compiled while the first step is traced, and the step beside them, then beside what
        its report needs: none of them fills two cores. Elsewhere, compilers need the devices' memory and, on several hosts, one
        order.
        """
        session = self.session
        weights = initial_program(session.cfg, session.specs, self.optimizer, session.mesh)
        if session.platform != "cpu" or processes.several():
            return weights.compile()()
        with ThreadPoolExecutor(2) as beside:  # which only compile: two that trace hold each other up
            generators = beside.submit(weights.compile)
            first = self.lower(0)
            beside.submit(first.compile)  # what it raises, the first step raises again
            state = generators.result()()
            self.grid_watch.rehearse(state.params)
        return state


def build(session: Session) -> Machine:
    """Optimizer and compiled step for a session."""
    cfg = session.cfg
    program = step_program(cfg, session.specs, session.mesh, session.compute_dtype)
    options = known_options(step_options(session.mesh.devices.flat[0]))
    programs = {settled: program.jitted(settled, options) for settled in (False, True)}
    settles_at = program.settles_at

    def at(step: int) -> Callable:
        return programs[settles_at is not None and step >= settles_at]

    def train_step(step: int, state: TrainState, batch: Batch):
        return at(step)(state, batch)

    def lower(step: int) -> Lowered:
        if step and step == settles_at:
            console.print(f"the grid is whole from step {step + 1} on; the program for that is compiled now")
        return at(step).lower(program.state, abstract_batch(cfg, session.mesh))

    @jax.jit
    def update_only(state):
        """The optimizer's share of a step by itself; the parameters stand in for a gradient. Only sums come out: beside a state
        that must stay as it is there may be no room for all updates."""
        logits = jnp.zeros((cfg.model.num_hidden_layers, cfg.model.num_attention_heads))
        counts = jnp.ones((cfg.model.num_moe_layers, cfg.model.n_routed_experts))
        updates, _ = program.optimizer.update(
            state.params, state.optimizer, state.params, max_logits=logits, expert_counts=counts
        )
        return jax.tree.map(jnp.sum, updates)

    def time_update(state) -> float:
        jax.block_until_ready(update_only(state))
        start = time.perf_counter()
        jax.block_until_ready(update_only(state))
        return time.perf_counter() - start

    grid_watch = GridWatch(session.specs, cfg.quant)
    return Machine(session, program.optimizer, train_step, lower, settles_at, time_update, grid_watch)
