"""Every form of Newton-Schulz that runs on this device, on matrices of real models, against the matrix units' limit.

    python -m bench.newton_schulz

The limit is the fastest large square product of the form's number format, in turns with the forms. `useful` is the FLOPs of
the plain form over those of the limit in the same time: a form that multiplies less may exceed 1. `multiplied` counts what the
form itself multiplies. Times are the clock's on an accelerator and CPU time on a CPU, where others may be at work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from bench import measure
from configs.platforms import platform_of
from optim import symmetric_gpu, symmetric_tpu
from optim.form import GRAM_DTYPE, carrier_dtype, choose_form
from optim.gram import gram_flops, gram_newton_schulz, segments_for
from optim.newton_schulz import coefficients, newton_schulz, standard_flops
from optim.symmetric import IMPLEMENTATIONS, by_rows

SHAPES = {"tiny": (96, 128, 128), "laptop": (64, 128, 256), "Moonlight": (64, 2048, 1408), "K2": (4, 7168, 2048)}
"""Matrices, rows, columns: a layer's experts, of Kimi K2 four of them."""

ON_A_CPU = {"Moonlight": 1, "K2": 1}
"""Fewer matrices: a CPU takes seconds for one."""

LIMIT = {"cpu": (512, 1024, 2048)}
"""Sides of square products, 8192 on accelerators; the fastest is the limit. A CPU's is not the largest."""

COEFFS = coefficients("keller", 5)

IMPLEMENTATIONS |= {f"rows of {blocks}": by_rows(blocks) for blocks in (2, 8)}


def products(m: int, n: int, platform: str) -> list[str]:
    """Of the registry, those that run here on an m x n matrix, m <= n."""
    runs = {
        "full": True,
        "tpu": platform == "tpu" and symmetric_tpu.takes(m, n),
        "hopper": platform == "hopper" and symmetric_gpu.takes(m, n),
    }
    own = runs.get(platform, False)  # what goes row by row is for where there is no kernel
    return [name for name in IMPLEMENTATIONS if runs.get(name, not own and m % 8 == 0)]


def forms(m: int, n: int, platform: str) -> dict[str, tuple[Callable, int, str]]:
    """Name to (function of [count, m, n], FLOPs of one matrix, format that it multiplies)."""
    carrier = carrier_dtype(platform)
    gram = GRAM_DTYPE.get(platform, carrier)
    segments = segments_for(COEFFS, gram)
    found = {"plain": (partial(newton_schulz, coeffs=COEFFS, dtype=carrier), standard_flops(m, n, 5), carrier)}
    for name in products(min(m, n), max(m, n), platform):
        run = partial(gram_newton_schulz, coeffs=COEFFS, segments=segments, dtype=jnp.dtype(gram), product=name)
        found[f"gram, {name}"] = run, gram_flops(m, n, segments, name), gram
    return found


def row(shape: str, platform: str) -> dict:
    count, m, n = SHAPES[shape]
    count = ON_A_CPU.get(shape, count) if platform == "cpu" else count
    x = jax.random.normal(jax.random.key(0), (count, m, n), carrier_dtype(platform))
    all_forms, sides = forms(m, n, platform), LIMIT.get(platform, (8192,))
    runs = {name: partial(jax.jit(run), x) for name, (run, _, _) in all_forms.items()}
    for dtype, side in itertools.product({dtype for _, _, dtype in all_forms.values()}, sides):
        square = jax.random.normal(jax.random.key(1), (side, side), dtype)
        runs[f"limit {dtype} {side}"] = partial(jax.jit(lambda x: x @ x), square)
    times = measure.in_turns(runs, rounds=3)
    clock = "cpu_ms" if platform == "cpu" else "wall_ms"
    out = {}
    for name, (_, flops, dtype) in all_forms.items():
        rate = max(2 * side**3 / times[f"limit {dtype} {side}"][clock] for side in sides)
        of_limit = [round(count * f / times[name][clock] / rate, 3) for f in (standard_flops(m, n, 5), flops)]
        out[name] = {"dtype": dtype, "useful": of_limit[0], "multiplied": of_limit[1]}
    return {
        "shape": shape,
        "matrices": count,
        "m": m,
        "n": n,
        "chosen": choose_form(m, n, COEFFS, platform).describe(),
        "share of the limit": out,
        "times": times,
    }


def main() -> None:
    platform, rows = platform_of(jax.devices()[0]), []
    for shape in SHAPES:
        rows.append(row(shape, platform))
        for name, share in rows[-1]["share of the limit"].items():
            print(
                f"{shape:10} {name:16} {share['dtype']:9} useful {share['useful']:.2f}  multiplied {share['multiplied']:.2f}",
                flush=True,
            )
        print(f"{shape:10} chosen: {rows[-1]['chosen']}", flush=True)
    print(f"wrote {measure.write('newton_schulz', rows).name}")


if __name__ == "__main__":
    measure.parser(__doc__).parse_args()
    main()
