"""Checkpoints: Orbax v1 behind one file, with a fingerprint of every array.

Orbax is atomic under kill -9, but restores flipped bits without a word. So each checkpoint carries, per array, a
32-bit sum of (bit pattern mixed with position): integer addition has no order, so the value does not depend on the
mesh. It is recomputed after every restore; a checkpoint that fails is named, left on disk, and the one before it is
tried.

On disk the state is a flat dict of arrays, `params/moe.attn.q_a`, `optimizer/...`, `step`, whatever the mesh was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ConfigError
from train.compat import orbax


class CheckpointError(ConfigError):
    """No checkpoint could be restored; the message says which was tried and what is wrong with it."""


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path; the path is the array's name on disk."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflat(named: dict[str, Any], like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flat(like)])


def fingerprint(x: jax.Array) -> jax.Array:
    """uint32 that changes with any flipped bit and any swap of elements, and with nothing else."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


_fingerprints = jax.jit(lambda named: {name: fingerprint(x) for name, x in named.items()})


@dataclass
class Restored:
    """A restored state, the step it is from, and a sentence for each newer checkpoint that was damaged."""

    state: Any
    step: int
    damaged: list[str]


class Checkpoints:
    """The checkpoints of one run directory. Saving is asynchronous; `close` waits for it. The newest `keep` stay, and
    the steps in `landmarks`."""

    def __init__(self, directory: Path, keep: int = 2, landmarks: tuple[int, ...] = ()):
        self.directory = Path(directory).absolute()
        self.keep, self.landmarks = keep, landmarks
        self._checkpointer = None

    def _open(self):
        if self._checkpointer is None:
            ocp = orbax()
            policies = ocp.training.preservation_policies
            self._checkpointer = ocp.training.Checkpointer(
                self.directory, preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self.keep), policies.CustomSteps(self.landmarks)]),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True)
        return self._checkpointer

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.is_dir() and p.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Start writing `state`; returns as soon as the device arrays may be reused."""
        named = flat(state)
        prints = {name: np.asarray(value) for name, value in _fingerprints(named).items()}
        self._open().save_checkpointables_async(step, {"state": named, "fingerprint": prints}, force=True)

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """The newest sound checkpoint (or exactly `step`), placed as the abstract state `like` says. `like` may be a
        part of what was saved, such as {"params": ...}: only that is read."""
        candidates = [s for s in self.steps() if step is None or s == step]
        if not candidates:
            raise CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} in {self.directory}; "
                                  f"there are: {self.steps() or 'none'}")
        damaged = []
        for candidate in reversed(candidates):
            try:
                return Restored(self._load(candidate, like), candidate, damaged)
            except CheckpointError as error:
                damaged.append(str(error))
        raise CheckpointError("no sound checkpoint is left: " + "; ".join(damaged)
                              + "; delete the folder to start again, or restore it from a copy")

    def _load(self, step: int, like: Any) -> Any:
        wanted = flat(like)
        try:
            ocp = orbax()
            loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
            with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                found = ocp.load_checkpointables(
                    self.directory / str(step),
                    {"state": wanted, "fingerprint": {name: np.zeros((), np.uint32) for name in wanted}})
        except Exception as error:  # Orbax and TensorStore raise many types for one fact: it cannot be read.
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read ({reason})") from error
        prints = _fingerprints(found["state"])
        bad = [name for name in wanted if int(prints[name]) != int(found["fingerprint"][name])]
        if bad:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} is damaged: {len(bad)} of {len(wanted)} "
                                  f"arrays differ from what was saved, the first is {bad[0]}")
        return unflat(found["state"], like)

    def set_aside(self, newer_than: int) -> None:
        """Rename checkpoints newer than a step to `damaged-STEP`: training goes on before them, nothing is deleted."""
        for step in self.steps():
            if step > newer_than:
                (self.directory / str(step)).rename(self.directory / f"damaged-{step}")

    def close(self) -> None:
        """Wait until everything that was started is on disk."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
