"""One program in several processes: who is first, which rows are mine, and values that every process can read.

All processes run the same steps on the same global arrays. The first one writes the run directory's small files and
prints; checkpoints are written by all (train/checkpoint.py). On one machine `train/local.py` starts the processes and
tells each its place through the three variables below; on a cluster jax finds them out.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import ConfigError
from train.run_dir import RunDir
from train.stop import EXIT_FAILED, EXIT_LOST, EXIT_USAGE

COORDINATOR, COUNT, INDEX = "ABRUZZI_COORDINATOR", "ABRUZZI_PROCESSES", "ABRUZZI_PROCESS"
"""host:port of the first process, how many there are, and which one this is."""

START_SECONDS = 120
"""How long to wait for the other processes before saying which could not be reached."""

HEARTBEAT_SECONDS = 30
"""After this long without a sign from a process the others end: a killed host must not leave the rest waiting."""


def join(cluster: bool = False) -> None:
    """Before anything touches a device: join the other processes, if this is one of several. `cluster` lets jax find
    them (TPU pods, Slurm, Kubernetes)."""
    address = os.environ.get(COORDINATOR)
    if not address and not cluster:
        return
    place = (
        dict(coordinator_address=address, num_processes=int(os.environ[COUNT]), process_id=int(os.environ[INDEX]))
        if address
        else {}
    )
    try:
        jax.distributed.initialize(**place, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes could not be joined ({str(error).splitlines()[0]}); start the same command on every "
            f"host, and check that {address or 'the first one'} can be reached from each"
        ) from error


def joined_by_launcher() -> bool:
    """Whether train/local.py started this process as one of several."""
    return COORDINATOR in os.environ


def first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def meet(where: str) -> None:
    """Wait until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(where)


def require_same(what: str, *values: object) -> None:
    """ConfigError in all processes if these values are not the same in all of them. Waits for all."""
    if several():
        digest = int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:4], "big") >> 1
        theirs = multihost_utils.process_allgather(np.int32(digest)).reshape(-1)
        if other := [i for i, one in enumerate(theirs) if one != theirs[0]]:
            raise ConfigError(
                f"{what} are not the same in process {other[0]} as in the first one; start the same command with "
                f"the same files on every host"
            )


def failing(fine: bool) -> int | None:
    """The first process in which this is not true. Waits for all."""
    found = multihost_utils.process_allgather(np.int32(fine)).reshape(-1) if several() else np.array([fine])
    return None if found.all() else int(found.argmin())


def require_all(fine: bool, what: str) -> None:
    """ConfigError in all processes unless this is true in all of them. Waits for all."""
    if several() and (where := failing(fine)) is not None:
        raise ConfigError(f"process {where} does not {what}")


def agree(number: int) -> int:
    """The first process's number, in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


@contextmanager
def alone(run: RunDir, new: bool = False) -> Iterator[None]:
    """The run belongs to these processes for the length of the block; ConfigError in all of them where it is another's, or was
    begun by another since it was found to be `new`. The first one holds the lock. Waits for all."""
    held = run.lock() if first() else None
    try:
        if failing(not first() or (held is not None and not (new and run.exists()))) is not None:
            raise ConfigError(
                f"{run.path} is being trained by another process; wait until that has ended, or name another directory with --run"
            )
        yield
    finally:
        if held:
            held.close()


OWN_FAILURES = re.compile("RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|[Cc]ompil")
"""What a device says of this process's own program; whatever else breaks off a step among several is the loss of another."""


WIRES = re.compile("[Gg]loo|[Cc]oordination service|heartbeat")
"""Of what a ValueError speaks that the loss of another process raised on the host, where jax has no error of its own."""


def lost_another(error: BaseException) -> bool:
    """Whether a collective broke off because another process is gone."""
    said = str(error)
    of_collective = isinstance(error, jax.errors.JaxRuntimeError) or isinstance(error, ValueError) and WIRES.search(said)
    return several() and bool(of_collective) and not OWN_FAILURES.search(said)


@contextmanager
def ending_together():
    """Of several processes one that fails ends with a sentence and a code of its own: EXIT_LOST where another process is gone,
    EXIT_USAGE for a wrong command, EXIT_FAILED otherwise. The usual way out would wait for the others, and they for this one."""
    try:
        yield
    except Exception as error:
        if not several():
            raise
        this, said = f"process {jax.process_index()} of {jax.process_count()}", (str(error) or repr(error)).splitlines()[0][:160]
        if lost_another(error):
            code, sentence = EXIT_LOST, f"{this} lost another one ({said}); start all again, they go on from what was saved"
        elif isinstance(error, ConfigError | OSError) and not isinstance(error, ConnectionError):  # as launch.py says of one
            code, sentence = EXIT_USAGE, str(error) or repr(error)
        else:
            traceback.print_exc()
            code, sentence = EXIT_FAILED, f"{this} failed: {said}"
        sys.stdout.flush()  # nobody else will
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(code)


def stop_here(step: int) -> bool:
    """Whether a SIGTERM that reached any process stops all of them after this step; jax agrees on one for all."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


def my_rows(sharding: NamedSharding, batch_size: int, seq_len: int) -> slice:
    """The smallest range of rows that holds all rows of this process's devices."""
    if not several():
        return slice(0, batch_size)
    rows = [index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size, seq_len)).values()]
    return slice(min(r[0] for r in rows), max(r[1] for r in rows))


def place(batch: dict[str, np.ndarray], sharding: NamedSharding, rows: slice, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays [batch_size, S] from the rows of this process: every device gets its rows, and its run of positions."""
    if not several():
        return jax.device_put(batch, sharding)

    def array(local: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - rows.start : stop - rows.start, index[1]]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: array(local) for name, local in batch.items()}


def host_values(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the host, whole, in every process; text and numbers pass through. All processes must call it."""
    if several():
        arrays = {i: x for i, x in enumerate(jax.tree.leaves(tree)) if isinstance(x, jax.Array) and not x.is_fully_replicated}
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)
        leaves = [whole.get(i, x) for i, x in enumerate(jax.tree.leaves(tree))]
        tree = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        tree = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) else x, tree)
    return jax.device_get(tree)
