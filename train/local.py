"""`launch.py train --on local:2`: several processes on this machine, each with CPU devices of its own.

The test bed of everything that concerns several hosts: real processes, real sockets, the same program. `local:2x4` gives
each of two processes four devices; without the second number, as many as the mesh needs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from configs.schema import ConfigError, MeshConfig
from train.processes import COORDINATOR, COUNT, INDEX
from train.stop import EXIT_DONE, EXIT_FAILED, EXIT_LOST, EXIT_STOPPED, EXIT_USAGE

GRACE_SECONDS = 10.0
"""What the others get to end by themselves once one is lost."""


def parse(where: str, mesh: MeshConfig) -> tuple[int, int]:
    """Processes and devices per process of `local:N` or `local:NxM`."""
    found = re.fullmatch(r"local:(0|[1-9]\d*)(?:x(0|[1-9]\d*))?", where)
    if not found or "0" in found.groups():
        raise ConfigError(f"--on {where}: write local, local:PROCESSES, local:PROCESSESxDEVICES (such as local:2x4) or cluster")
    processes = int(found.group(1))
    needed = max(mesh.data, 1) * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
    devices = int(found.group(2) or max(needed // processes, 1))
    total = processes * devices
    if total % needed or (mesh.data and total != needed):
        raise ConfigError(f"--on {where} has {total} devices but the mesh needs {needed}; choose processes x devices = {needed}")
    return processes, devices


def run(arguments: list[str], processes: int, devices: int) -> int:
    """Start `launch.py ARGUMENTS` in every process and wait. SIGINT and SIGTERM reach all of them.

    The code is the processes' own where they agree; EXIT_LOST where one ended without being asked, and EXIT_FAILED where one
    failed, with a sentence that names it, after the others were ended too.
    """
    command = [sys.executable, str(Path(__file__).parent.parent / "launch.py"), *arguments]
    address = f"127.0.0.1:{_free_port()}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    common = os.environ | {
        COORDINATOR: address,
        COUNT: str(processes),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
    }
    children = [subprocess.Popen(command, env=common | {INDEX: str(i)}, start_new_session=True) for i in range(processes)]

    def pass_on(_number, _frame):
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()


def _wait(children: list[subprocess.Popen]) -> int:
    while True:
        codes = [child.poll() for child in children]
        lost = [i for i, code in enumerate(codes) if code not in (None, EXIT_DONE, EXIT_STOPPED)]
        if lost:  # survivors notice within moments and end too: the one that was told wrong, or was killed, is the cause
            return _lost(children, min(lost, key=lambda i: (codes[i] != EXIT_USAGE, codes[i] > 0, codes[i] == EXIT_LOST)))
        if None not in codes:
            return max(codes)
        time.sleep(0.1)


def _lost(children: list[subprocess.Popen], index: int) -> int:
    """One process ended in a way it should not have: end the others within GRACE_SECONDS and say which it was."""
    code = children[index].returncode
    if code == EXIT_USAGE:  # it has said what is wrong; so will the others
        deadline = time.monotonic() + GRACE_SECONDS
    else:
        how = (
            "failed"
            if code == EXIT_FAILED
            else f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with code {code}"
        )
        then = "" if code == EXIT_FAILED else ", and the same command goes on from the newest checkpoint"
        print(f"error: process {index} of {len(children)} {how}; the others are ended{then}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + GRACE_SECONDS / 5
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
    return code if code in (EXIT_USAGE, EXIT_FAILED) else EXIT_LOST


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
