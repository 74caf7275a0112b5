"""What is experimental or private in jax and its neighbours, and used here; Pallas' parts are in kernels/ and model/kernels."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from train.compiler_options import step_options

GPU_MEMORY = 0.95
"""Of a GPU's memory what a program is given, unless the user says otherwise: jax's 0.75 leaves a fifth of a planned run out.
The rest is for the driver and the libraries."""


def quiet_absl_flags() -> None:
    """Grain's worker options read absl flags, which are unparsed in a program that does not run under absl.app."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def start_jax(platform: str | None = None, cache: Path | None = None) -> None:
    """Before anything computes: platform, tree-mode Flax, a persistent compilation cache, and quiet libraries."""
    # XLA's warnings are about its own tuning, such as a first try that asked for too much memory; its errors are not quiet.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_MEMORY)
    if Path("/dev/nvidiactl").exists() and "triton_gemm" not in os.environ.get("XLA_FLAGS", ""):
        # For programs besides the step, whose options say the same and why: train/compiler_options.py.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"
    if platform:
        jax.config.update("jax_platforms", platform)
    tree_mode()
    jax.config.update("jax_compilation_cache_dir", str(cache or Path.home() / ".cache" / "abruzzi" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    for name in ("orbax", "absl", "jax._src.compiler", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")
    quiet_absl_flags()


def tree_mode() -> None:
    """Modules are pytrees. Flax keeps that setting per thread."""
    from flax import nnx

    nnx.set_graph_mode(False)


def slowed_kernels(platform: str) -> str:
    """Why kernels of this jax are slower than they need be, empty where they are not."""
    import jax

    if platform != "hopper" or jax.__version_info__ < (0, 12):
        return ""
    return (
        f"jax {jax.__version__} may assemble our attention with nvJitLink, whose backward pass takes twice as long; "
        "install jax 0.11.2 instead (pip install -e '.[cuda13]' or '.[cuda12]')"
    )


def compile_seconds() -> Callable[[], float]:
    """A clock of the time in which jax traces, lowers or compiles from now on, in seconds; what happens at once, in several
    threads or one within another, counts once."""
    import jax

    busy: list[tuple[float, float]] = []

    def add(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            busy.append((time.monotonic() - seconds, time.monotonic()))

    def total() -> float:
        seconds, until = 0.0, 0.0
        for begin, end in sorted(busy):
            seconds += max(end - max(begin, until), 0.0)
            until = max(until, end)
        return seconds

    jax.monitoring.register_event_duration_secs_listener(add)
    return total


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step. glibc returns every freed array to the kernel, which clears
    its pages again one by one when the next step asks for them: a quarter of a step on two cores. Two arenas, so that
    small objects of worker threads do not split the large free blocks. Nothing happens with another C library."""
    import ctypes

    mmap_max, trim_threshold, arena_max = -4, -1, -8
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for setting, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 2)):
            libc.mallopt(setting, value)


def orbax():
    """Orbax's v1 interface, still under `experimental` in the 0.12 source tree."""
    from orbax.checkpoint import v1

    # Where loading fails, Orbax leaves what it had begun to Python, which says so behind our sentence.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    return v1


def interpreter() -> str:
    """Python and jax versions, for reports."""
    import jax

    return f"Python {sys.version.split()[0]}, jax {jax.__version__}"


def abstract_devices(platform: str, name: str, slices: int = 1, gpu_target: str = "") -> list:
    """Devices of a machine that need not be there, to compile for: `name` is `v5p:8x8x8` on tpu, nodes x GPUs on cuda.

    ModuleNotFoundError where the platform's compiler is not installed, ValueError where it refuses the name.
    """
    from importlib.util import find_spec

    # Before libtpu is loaded: no cloud machine's metadata, and other processes may hold its lock file.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": name.replace(":", "-"),
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        if platform == "tpu":
            if find_spec("libtpu") is None:
                raise ModuleNotFoundError("libtpu")
            megacore = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
            found = topologies.get_topology_desc(topology_name=name, platform="tpu", num_slices=slices, **megacore)
        else:
            if not any(find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13) if find_spec("jax_plugins")):
                raise ModuleNotFoundError("jax_plugins.xla_cuda")
            found = topologies.get_topology_desc("plan", "cuda", target_config=gpu_target, topology=f"1x{name}")
    except (RuntimeError, ValueError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        raise ValueError(str(error).splitlines()[0]) from error
    return list(found.devices)


def device_grid(sizes: tuple[int, ...], devices: list) -> np.ndarray:
    """Devices in the shape of a mesh, neighbours on the wires where the mesh has neighbours. Of several slices the first
    axis, a multiple of their number, crosses from one to the next."""
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1)), devices, allow_split_physical_axes=True
    )


def once_options(platform: str) -> dict:
    """What a program that runs once is compiled with: on a CPU, LLVM's full effort on the generators of initial weights
    takes three times longer than all the rest of it."""
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else {}


def compile_for_devices(lowered, dump: Path, devices: list):
    """Compile for abstract devices and leave the compiler's own account of HLO and memory in `dump`, also where memory
    does not suffice. Raises what the compiler raises."""
    options = step_options(devices[0]) | {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    if devices[0].platform != "tpu":
        # The default replaces small all-reduces by a kernel that cannot be compiled without a GPU.
        options["xla_gpu_experimental_use_collective_kernels"] = ""
        # There is nothing to time kernels on, and the tuner would compile all it could choose from: most of the time.
        options["xla_gpu_autotune_level"] = 0
    return compile_with(lowered, options)


def compile_with(lowered, options: dict):
    """Compile with those of the options that this compiler knows."""
    return _compile(lowered, options)[0]


def known_options(options: dict) -> dict:
    """Those that the compiler of this process's devices knows: they come and go with its versions. What XLA_FLAGS names is the
    user's."""
    import jax

    options = {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
    return _compile(jax.jit(lambda: 0).lower(), options)[1] if options else {}


def _compile(lowered, options: dict) -> tuple:
    """The compiled program, and the options that the compiler knew."""
    import jax

    try:
        return lowered.compile(compiler_options=options), options
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
    return _compile(lowered, {name: value for name, value in options.items() if name != unknown[1]})
