"""The one place that touches experimental or private interfaces of jax and its neighbours."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path


def quiet_absl_flags() -> None:
    """Grain's worker options read absl flags, which are unparsed in a program that does not run under absl.app."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def start_jax(platform: str | None = None, cache: Path | None = None) -> None:
    """Before anything computes: platform, tree-mode Flax, a persistent compilation cache, and quiet libraries."""
    if platform:
        os.environ["JAX_PLATFORMS"] = platform
    import jax
    from flax import nnx

    nnx.set_graph_mode(False)
    jax.config.update("jax_compilation_cache_dir", str(cache or Path.home() / ".cache" / "abruzzi" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    for name in ("orbax", "absl", "jax._src.compiler", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")
    quiet_absl_flags()


def orbax():
    """Orbax's v1 interface, still under `experimental` in the 0.12 source tree."""
    from orbax.checkpoint import v1

    return v1


def interpreter() -> str:
    """Python and jax versions, for reports."""
    import jax

    return f"Python {sys.version.split()[0]}, jax {jax.__version__}"
