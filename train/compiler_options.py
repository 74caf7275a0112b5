"""What the train step is compiled with, as data per chip.

Options come and go with compilers' versions: who compiles asks each which of them it knows (train/compat.py), and goes
on without the others. docs/plan.md says what they bring.
"""

from __future__ import annotations

from typing import Any

TPU = {
    # Takes reductions of gradients out of the loop over microbatches, which would keep whole gradients instead of parts;
    # in libtpu 0.0.50 it fails on ours.
    "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"
}

SPARSE_CORES = TPU | {
    # Gathers and scatters over the wires are driven by the SparseCores, beside the work of the TensorCores. The compiler
    # makes none of them asynchronous otherwise. Most of these are in public recipes for such chips (tpu-recipes).
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    # An all-gather over whole axes of the torus would become an all-reduce of an array that is mostly zero.
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_enable_async_all_gather": "true",
}

GPU = {
    # Products are left to cuBLAS. Otherwise XLA compiles some thirty Triton kernels for each product of the program to see
    # which is fastest: on 16 cores beside an H200 that was not done after 150 s for `one_gpu` (docs/performance.md).
    "xla_gpu_enable_triton_gemm": False,
    # A product whose result is kept for the backward pass, in the stack of all layers', is used at once too. XLA would compute it
    # twice then, once into the stack: of `one_gpu` the first product of every expert (docs/performance.md).
    "xla_gpu_enable_dynamic_slice_fusion": False,
}

BY_KIND = {"TPU v5": SPARSE_CORES, "TPU v6 lite": SPARSE_CORES, "TPU7x": SPARSE_CORES}
"""By jax's device_kind; "TPU v5" is v5p. A v5e has no SparseCore."""


def step_options(device: Any) -> dict[str, Any]:
    """For a device, which need not be there."""
    return BY_KIND.get(device.device_kind, {"tpu": TPU, "gpu": GPU}.get(device.platform, {}))
