"""Chips that need not be there: their rates, how they are wired, and abstract devices to compile for.

A name is CHIP:SHAPE or CHIP-COUNT, and SLICESx in front of it for several slices: `v5p:8x8x8`, `v6e-16`,
`2xtpu7x:4x8x8`, `h100:64x8` (64 nodes of 8). TPU programs are compiled by libtpu, GPU programs by jax's CUDA plugin;
neither needs a chip.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from configs.schema import ConfigError, require
from train import compat
from train.compat import GPU_MEMORY
from train.metrics import peak_flops

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Vendors' figures of a chip; bandwidths in bytes per second and one direction.

    kind        jax's device_kind; devices: jax devices per chip
    hbm         bytes that a program may use on one device: what the compiler allows on TPUs, what jax is given on GPUs
    bandwidth   of a chip's memory
    link        of one inter-chip link: a torus link, or a GPU's share of the switch inside a node
    outside     of a chip's share of the network between slices or nodes
    dimensions  of the torus, 0 for a switch; wraps_from: an axis of at least (and a multiple of) this many chips is closed
    matmul, memory, wire   shares of the peak rates that large operations reach
    """

    kind: str
    devices: int
    hbm: float
    bandwidth: float
    link: float
    outside: float
    dimensions: int
    wraps_from: int = 0
    matmul: float = 0.83
    memory: float = 0.9
    wire: float = 0.9

    @property
    def platform(self) -> str:
        return "tpu" if self.dimensions else "cuda"

    @property
    def flops(self) -> float:
        """bf16 peak of one chip, multiply and add counted apart."""
        return peak_flops(self.kind) * self.devices


# TPUs: docs.cloud.google.com/tpu/docs (tpu7x and v5e pages): bidirectional bandwidth per chip over links and directions.
# GPUs: NVIDIA data sheets of HGX H100, H200 and B200, NDR 400 Gb/s per GPU outside. Reached shares: tpu-recipes' Ironwood
# microbenchmarks (GEMM 0.83); for GPUs an assumption that `bench.train_gpu` on one is to replace.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 1, 15.75 * GIB, 819e9, 50e9, 6.25e9, 2, 16),
    "v5p": Chip("TPU v5", 1, 95.73 * GIB, 2765e9, 100e9, 6.25e9, 3, 4),
    "v6e": Chip("TPU v6 lite", 1, 31.24 * GIB, 1638e9, 100e9, 12.5e9, 2, 16),
    "tpu7x": Chip("TPU7x", 2, 94.74 * GIB, 7380e9, 100e9, 12.5e9, 3, 4),
    "h100": Chip("H100", 1, GPU_MEMORY * 84942979072, 3352e9, 450e9, 50e9, 0, matmul=0.8, wire=0.8),
    "h200": Chip("H200", 1, GPU_MEMORY * 151397597184, 4800e9, 450e9, 50e9, 0, matmul=0.8, wire=0.8),
    "b200": Chip("B200", 1, GPU_MEMORY * 191514411008, 7672e9, 900e9, 50e9, 0, matmul=0.8, wire=0.8),
}

POD = 9216
"""Chips of the largest slice there is, a tpu7x pod's (docs.cloud.google.com/tpu/docs)."""

NODE = 8
"""GPUs of a node when only their count is given."""


@dataclass(frozen=True)
class Topology:
    """A machine: slices of a torus of chips, or nodes of GPUs (`shape` is then nodes, GPUs per node)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def device_count(self) -> int:
        return self.chips * self.chip.devices

    def devices(self) -> list[Any]:
        """Abstract devices in the order of the machine. ConfigError where they cannot be made, with the way out."""
        sizes = self.name.partition(":")[2]
        try:
            if self.chip.platform == "tpu":
                return compat.abstract_devices("tpu", self.name, self.slices)
            return compat.abstract_devices("cuda", sizes, gpu_target=gpu_target(self.chip))
        except ModuleNotFoundError as error:
            extra = "plan-tpu" if self.chip.platform == "tpu" else "plan-gpu"
            raise ConfigError(
                f"planning for {self.name} needs {error.name or error}, which compiles for chips that are not "
                f"there; install it with pip install -e '.[{extra}]'"
            ) from error
        except ValueError as error:
            raise ConfigError(f"the compiler knows no machine {self.name}: {error}") from error


def torus(chips: int, dimensions: int) -> tuple[int, ...] | None:
    """The most cubic shape of `chips` chips with sides that slices have: powers of two, 3-d ones also 12, 20, 24, 28."""
    sides = [1, 2, 4, 8, 16] + ([12, 20, 24, 28, 32] if dimensions == 3 else [])
    shapes = (
        [(a, b) for a in sides for b in sides if a <= b]
        if dimensions == 2
        else [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
    )
    fitting = [s for s in shapes if math.prod(s) == chips]
    best = min(fitting, key=sum, default=None)
    return best if best is None or dimensions == 2 or chips > 4 else tuple(sorted(best, reverse=True))


def topology(name: str) -> Topology:
    """The machine of a name. ConfigError with what is known where the name is not."""
    size = r"[1-9]\d{0,4}"
    found = re.fullmatch(rf"(?:({size})x)?([a-z]+\w*?)[:-]({size}(?:x{size})*)", name.lower())
    chip_name = found.group(2) if found else re.split(r"[:-]", name.lower())[0]
    if not found or chip_name not in CHIPS:
        near = difflib.get_close_matches(chip_name, CHIPS, 1) if chip_name not in CHIPS else ()
        raise ConfigError(
            f"there is no topology {name!r}; {f'did you mean {near[0]}? ' if near else ''}write CHIP:SHAPE or "
            f"CHIP-COUNT with a chip of {', '.join(CHIPS)}, such as v5p:8x8x8, v6e-16 or h100:64x8"
        )
    chip, slices = CHIPS[chip_name], int(found.group(1) or 1)
    sizes = [int(n) for n in found.group(3).split("x")]
    if len(sizes) == 1:
        require(
            chip.dimensions > 0 or sizes[0] < NODE or sizes[0] % NODE == 0,
            f"{sizes[0]} GPUs are no whole nodes of {NODE}; write NODESxGPUS, such as {chip_name}:{-(-sizes[0] // NODE)}x{NODE}",
        )
        shape = torus(sizes[0], chip.dimensions) if chip.dimensions else (max(sizes[0] // NODE, 1), min(sizes[0], NODE))
        require(
            shape is not None and math.prod(shape) == sizes[0],
            f"no {chip_name} slice has {sizes[0]} chips; give its shape, such as {chip_name}:"
            f"{'x'.join('4' * (chip.dimensions or 2))}",
        )
    else:
        shape = tuple(sizes)
    wanted = chip.dimensions or 2
    require(
        len(shape) == wanted,
        f"a {chip_name} {'slice' if chip.dimensions else 'cluster'} has {wanted} sizes"
        f"{'' if chip.dimensions else ', nodes x GPUs per node'}, not {'x'.join(map(str, shape))}",
    )
    require(
        not chip.dimensions or math.prod(shape) <= POD,
        f"no {chip_name} slice has {math.prod(shape)} chips, {POD} at most; several slices are written 2x{chip_name}:SHAPE",
    )
    require(slices == 1 or chip.dimensions > 0, f"{name} has several slices of GPUs; give all nodes in one shape")
    return Topology(f"{chip_name}:{'x'.join(map(str, shape))}", chip, shape, slices)


_GPU_CORES = {"H100": (9, 132), "H200": (9, 132), "B200": (10, 148)}


def gpu_target(chip: Chip) -> str:
    """The GPU as XLA's compiler wants it described (its GpuTargetConfigProto), without one being there."""
    major, cores = _GPU_CORES[chip.kind]
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "clock_rate_ghz": 1.9,
        "l2_cache_size": 50 * 2**20,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": round(chip.hbm / GPU_MEMORY),
        "device_address_bits": 64,
        "pcie_bandwidth": 32 * GIB,
    }
    fields = " ".join(f"{key}: {value}" for key, value in limits.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }} "
        f'device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.0a" name: "NVIDIA {chip.kind}" '
        f'driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" '
        f'dnn_version: "9.10.0" device_interconnect_info {{ active_links: 18 }} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA {chip.kind}"'
    )
