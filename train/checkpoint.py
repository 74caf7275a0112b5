"""Checkpoints: Orbax v1 behind one file, with a fingerprint of every array.

Orbax is atomic under kill -9, but restores flipped bits without a word. So each checkpoint carries, per array, a
32-bit sum of (bit pattern mixed with position): integer addition has no order, so the value does not depend on the
mesh. It is recomputed after every restore; a checkpoint that fails is named and renamed to `damaged-STEP`, and the one
before it is tried.

On disk the state is a flat dict of arrays, `params/moe.attn.q_a`, `optimizer/...`, `step`, whatever the mesh was.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ConfigError
from train import processes
from train.compat import orbax
from train.stored import StoredParams


class CheckpointError(ConfigError):
    """No checkpoint could be restored; the message says which was tried and what is wrong with it."""


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path; the path is the array's name on disk."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflat(named: dict[str, Any], like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flat(like)])


def fingerprint(x: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """uint32 that changes with any flipped bit and any swap of elements, and with nothing else. The fingerprints of the
    consecutive pieces of an array add up to its own; `first` is the place of a piece's first word."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += jnp.asarray(first, jnp.uint32)
    mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


_fingerprints = jax.jit(lambda named: {name: fingerprint(x) for name, x in named.items()})


LEAST_CHUNK = 1 << 20
"""Bytes. Leading axes of an array (layers, experts) are stored one index at a time while a piece is no smaller."""

MOST_CHUNK = 1 << 26
"""Bytes. An array without such axes is cut at this size: packed and unpacked, a piece is in memory twice."""


LEAST_SLICE = 1 << 24
"""Bytes. Of an array that many devices hold alike each writes a part of at least this size: parts are cut by programs, which
take longer to compile than a small array takes to write."""


def storage_options(path: Any, x: Any):
    """How an array is cut on disk, so that a reader of single experts need not read a layer (train/stored.py)."""
    axes, piece = [], x.nbytes
    for axis, size in enumerate(x.shape):
        if piece // size < LEAST_CHUNK:
            break
        axes.append(axis)
        piece //= size
    options = orbax().options.ArrayOptions.Saving.StorageOptions
    return options(shard_axes=tuple(axes)) if axes else options(chunk_byte_size=MOST_CHUNK) if x.nbytes > MOST_CHUNK else None


NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
"""What the system says where nothing more can be written. Python, Orbax and TensorStore raise it as different types."""


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """What fails in one of its threads they all log, each with a traceback, and it is raised here as well."""
    return not (record.exc_info and "orbax" in record.pathname)


@dataclass
class Restored:
    """A restored state, the step it is from, and a sentence for each newer checkpoint that was damaged."""

    state: Any
    step: int
    damaged: list[str]


def unreadable(directory: Path, error: object) -> CheckpointError:
    return CheckpointError(f"checkpoint {directory} cannot be read ({' '.join(str(error).split())[:200]})")


def _partly_loaded(directory: Path, wanted: dict[str, dict]) -> dict[str, dict]:
    """Every process reads its parts by itself: those that can would wait minutes in Orbax for one that can not."""
    ocp, this = orbax(), jax.process_index()
    partly = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    with ocp.Context(pytree_options=partly, multiprocessing_options=alone):
        return ocp.load_checkpointables(directory, wanted)


class Checkpoints:
    """The checkpoints of one run directory. Saving is asynchronous; `close` waits for it. The newest `keep` stay, and
    the steps in `landmarks`."""

    def __init__(self, directory: Path, keep: int = 2, landmarks: tuple[int, ...] = ()):
        self.directory = Path(directory).resolve()  # TensorStore refuses `..`
        self.keep, self.landmarks = keep, landmarks
        self._checkpointer = None

    def _open(self):
        if self._checkpointer is None:
            ocp = orbax()
            logging.getLogger("absl").addFilter(_not_of_orbax)
            policies = ocp.training.preservation_policies
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self.keep), policies.CustomSteps(self.landmarks)]
                ),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is no directory of checkpoints; move it away, or name another run with --run"
            )
        return sorted(int(p.name) for p in self.directory.iterdir() if p.is_dir() and p.name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Start writing `state`; returns as soon as the device arrays may be reused."""
        named = flat(state)
        prints = {name: np.asarray(value) for name, value in _fingerprints(named).items()}
        context = orbax().Context()
        context.array.saving.scoped_storage_options_creator = storage_options
        context.array.saving.min_slice_bytes_for_replica_parallel = LEAST_SLICE
        with context:
            self._open().save_checkpointables_async(step, {"state": named, "fingerprint": prints}, force=True)

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """The newest sound checkpoint (or exactly `step`), placed as the abstract state `like` says. `like` may be a
        part of what was saved, such as {"params": ...}: only that is read."""
        return Restored(*self._newest_sound(lambda candidate: self._load(candidate, like), step))

    def stored(self, shapes: dict[str, tuple[int, ...]], step: int | None = None) -> Restored:
        """The same without loading: `state` is a WeightSource of the parameters, whose fingerprints were found right."""
        return Restored(*self._newest_sound(lambda candidate: self._opened(candidate, shapes), step))

    def candidates(self, step: int | None) -> list[int]:
        """The checkpoints that may be restored, oldest first: all, or that of `step`. CheckpointError if there is none."""
        found = [s for s in self.steps() if step is None or s == step]
        if not found:
            raise CheckpointError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {self.directory}; "
                f"there are: {self.steps() or 'none'}"
            )
        return found

    def _newest_sound(self, load: Callable[[int], Any], step: int | None) -> tuple[Any, int, list[str]]:
        candidates, damaged = self.candidates(step), []
        for candidate in reversed(candidates):
            try:
                return load(candidate), candidate, damaged
            except CheckpointError as error:
                damaged.append(str(error))
        others = [s for s in self.steps() if s not in candidates]
        way = f"others are there: {others}" if others else "no sound checkpoint is left, restore one from a copy"
        raise CheckpointError("; ".join(damaged) + "; " + way)

    def _load(self, step: int, like: Any) -> Any:
        wanted, trouble = flat(like), None
        try:
            found = _partly_loaded(
                self.directory / str(step), {"state": wanted, "fingerprint": {name: np.zeros((), np.uint32) for name in wanted}}
            )
        except Exception as error:  # Orbax and TensorStore raise many types for one fact: it cannot be read.
            trouble = error
        if (where := processes.failing(trouble is None)) is not None:
            raise unreadable(self.directory / str(step), trouble or f"by process {where}") from trouble
        self._compare(step, _fingerprints(found["state"]), found["fingerprint"])
        if (held := int(found["state"].get("step", step))) != step:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} holds step {held}: it was copied or renamed")
        return unflat(found["state"], like)

    def _opened(self, step: int, shapes: dict[str, tuple[int, ...]]) -> StoredParams:
        directory = self.directory / str(step)
        try:
            saved = _partly_loaded(directory, {"fingerprint": {f"params/{path}": np.zeros((), np.uint32) for path in shapes}})
            params = StoredParams(directory, shapes)
            found = {f"params/{path}": params.fingerprint(path, fingerprint) for path in shapes}
        except Exception as error:  # as above
            raise unreadable(directory, error) from error
        self._compare(step, found, saved["fingerprint"])
        return params

    def _compare(self, step: int, found: dict[str, Any], saved: dict[str, Any]) -> None:
        bad = [name for name in found if int(found[name]) != int(saved[name])]
        if bad:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged: {len(bad)} of {len(found)} "
                f"arrays differ from what was saved, the first is {bad[0]}"
            )

    def set_aside(self, newer_than: int) -> None:
        """Rename checkpoints newer than a step to `damaged-STEP`, or `damaged-STEP-2` and so on where that was damaged before:
        training goes on before them, nothing is deleted."""
        for step in self.steps():
            if step > newer_than:
                names = itertools.chain([f"damaged-{step}"], (f"damaged-{step}-{n}" for n in itertools.count(2)))
                free = next(path for path in map(self.directory.joinpath, names) if not path.exists())
                (self.directory / str(step)).rename(free)

    @contextmanager
    def writing(self, remedy: str = "free some space and run the same command again") -> Iterator[None]:
        """A CheckpointError where the disk is full, now or at an earlier `save`; `remedy` is what to do then."""
        try:
            yield
        except Exception as error:
            said = next((words for words in NO_ROOM if words in str(error)), None)
            if said is None:
                raise
            on = f": it goes on from step {self.steps()[-1]}" if self.steps() else ""
            raise CheckpointError(f"{self.directory} cannot be written ({said}); {remedy}{on}") from error

    def close(self) -> None:
        """Wait until everything that was started is on disk."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
