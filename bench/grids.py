"""Reconstruction error of every codec, decibels of signal over noise on a million weights: `python -m bench.grids`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from quant.codecs import CODECS

SAMPLES = (1024, 1024)
GROUPS = (32, 128)


def distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draws = {"Gauss": rng.normal(size=SAMPLES), "Laplace": rng.laplace(size=SAMPLES), "t4": rng.standard_t(4, SAMPLES)}
    return {name: (0.02 * x).astype(np.float32) for name, x in draws.items()}


def main() -> None:
    table = Table("codec", *(f"{name} g{group}" for name in distributions() for group in GROUPS))
    for name, codec in CODECS.items():
        fake, cells = jax.jit(codec.fake, static_argnums=(1, 2)), []
        for w in distributions().values():
            for group in GROUPS:
                noise = jnp.sum(jnp.square(fake(w, -1, group) - w))
                cells.append(f"{float(10 * jnp.log10(jnp.sum(jnp.square(w)) / noise)):.2f}")
        table.add_row(name, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
