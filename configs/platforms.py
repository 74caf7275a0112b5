"""What a program is compiled for, as the registries of implementations tell it apart."""

from __future__ import annotations

from typing import Any


def platform_of(device: Any) -> str:
    """cpu, tpu, hopper (a GPU of compute capability 9, which our GPU kernels are written for) or gpu (any other one).

    `device` is jax's, of a mesh; it need not be there.
    """
    hopper = device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")
    return "hopper" if hopper else device.platform
