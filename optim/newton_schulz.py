"""The matrix sign of Muon: coefficient sets, their singular-value bands, and the iteration for a batch of matrices.

Every step maps a singular value s to a*s + b*s^3 + c*s^5 and leaves the singular vectors alone. After the division
by the Frobenius norm all values lie in [0, 1]; the composed polynomial lifts them towards 1. Which band they end in
depends on the set and on how small the smallest one was: `singular_value_band` gives the exact interval.

Sources: K. Jordan, "Muon" (keller); J. You's sequence, the default of Dion and Emerging-Optimizers (quintic);
Amsel et al., "The Polar Express", arXiv 2505.16932 (polar_express); the DeepSeek-V4 report (deepseek_v4).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from configs.schema import ConfigError

Coefficients = tuple[tuple[float, float, float], ...]

_KELLER = (3.4445, -4.7750, 2.0315)

_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
_POLAR_SAFETY, _POLAR_SAFE_STEPS = 1.01, 5


def _polar_express(steps: int) -> Coefficients:
    """The paper divides by (s, s^3, s^5) so that rounding cannot push a value out of the interval that the next step
    expects. Steps beyond the fifth act near 1, where their slope is below 1 and no such margin is needed."""
    table = _POLAR_EXPRESS + (_POLAR_EXPRESS[-1],) * max(0, steps - len(_POLAR_EXPRESS))
    s = _POLAR_SAFETY
    return tuple((a / s, b / s**3, c / s**5) if i < _POLAR_SAFE_STEPS else (a, b, c) for i, (a, b, c) in enumerate(table[:steps]))


@dataclass(frozen=True)
class Preset:
    """A named coefficient set. `steps` is the only count it defines; None: any count."""

    table: Coefficients | None
    steps: int | None
    why: str


PRESETS = {
    "keller": Preset(None, None, "Kimi K2, Moonlight; ends between 0.68 and 1.13 for values above 1e-2, five steps are usual"),
    "quintic": Preset(_QUINTIC, 5, "same cost as keller, within 3.2 % of 1 for values above 1e-2"),
    "polar_express": Preset(None, None, "within 0.4 % of 1 from 1e-3 on with six steps"),
    "deepseek_v4": Preset((_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2, 10, "exact to 0.2 % from 1e-4 on"),
}


def coefficients(name: str, steps: int) -> Coefficients:
    """The (a, b, c) of each step. ConfigError for an unknown set or a count that the set does not define."""
    if name not in PRESETS:
        raise ConfigError(f"optim.newton_schulz={name!r} is unknown; choose one of {', '.join(PRESETS)}")
    if steps < 1:
        raise ConfigError(f"optim.newton_schulz_steps must be at least 1, not {steps}")
    preset = PRESETS[name]
    if preset.steps is not None and steps != preset.steps:
        raise ConfigError(
            f"optim.newton_schulz={name} defines exactly {preset.steps} steps, "
            f"but optim.newton_schulz_steps={steps}; set it to {preset.steps}"
        )
    if name == "polar_express":
        return _polar_express(steps)
    return preset.table or (_KELLER,) * steps


def singular_value_band(coeffs: Coefficients, low: float, high: float = 1.0) -> tuple[float, float]:
    """Smallest interval that contains every output for inputs in [low, high], in exact arithmetic.

    The image of an interval under a continuous map is the interval between its extremes, and those lie at the ends or
    where the derivative a + 3b s^2 + 5c s^4 vanishes, so the composition can be followed step by step.
    """
    for a, b, c in coeffs:
        squares = np.roots([5 * c, 3 * b, a])
        critical = [float(np.sqrt(s.real)) for s in squares if abs(s.imag) < 1e-12 and s.real > 0]
        points = np.array([low, high] + [x for x in critical if low < x < high])
        values = points * (a + points**2 * (b + points**2 * c))
        low, high = float(values.min()), float(values.max())
    return low, high


def normalize(x: Float[Array, "*B m n"], over: tuple[str, ...] = ()) -> Float[Array, "*B m n"]:
    """Each matrix over its Frobenius norm, float32; zero stays zero.

    The division by the largest entry comes first, so that squares neither underflow nor overflow: gradients of rarely
    routed experts are small, and their direction is as good as any. `over`: mesh axes that cut the columns.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    largest = lax.pmax(largest, over) if over else largest
    x = x / jnp.where(largest == 0, 1.0, largest)
    squares = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(lax.psum(squares, over) if over else squares)
    return x / jnp.where(norm == 0, 1.0, norm)


def matmul(pattern: str, x: Array, y: Array) -> Array:
    """An einsum that accumulates in float32 and returns the operands' dtype."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(pattern, x, y, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def newton_schulz(x: Float[Array, "*B m n"], coeffs: Coefficients, dtype=jnp.float32) -> Float[Array, "*B m n"]:
    """U V^T of each matrix, up to the band of the coefficient set, in `dtype` (every product accumulates in float32).

    The smaller side is multiplied: X X^T from the left, or X^T X from the right for a tall matrix, which needs no
    transposed copy. Invariant to the scale of each matrix; zero in, zero out. Cost per matrix (m <= n, T steps):
    T * (4 m^2 n + 2 m^3).
    """
    tall = x.shape[-2] > x.shape[-1]
    gram, apply = ("...ki,...kj->...ij", "...ik,...kj->...ij") if tall else ("...ik,...jk->...ij", "...ik,...kj->...ij")
    x = normalize(x).astype(dtype)
    for a, b, c in coeffs:
        g = matmul(gram, x, x)
        p = b * g + c * matmul("...ik,...kj->...ij", g, g)
        x = a * x + (matmul(apply, x, p) if tall else matmul(apply, p, x))
    return x


def newton_schulz_cut(x: Float[Array, "*B m n"], coeffs: Coefficients, over: tuple[str, ...], dtype) -> Array:
    """`newton_schulz` for wide matrices whose columns are cut over the mesh axes `over`, inside shard_map.

    Each device multiplies its own columns; only X X^T, the small side squared, is summed over the devices, in float32.
    """
    x = normalize(x, over).astype(dtype)
    for a, b, c in coeffs:
        g = jnp.einsum(
            "...ik,...jk->...ij",
            x,
            x,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT,
        )
        g = lax.psum(g, over).astype(dtype)
        p = b * g + c * matmul("...ik,...kj->...ij", g, g)
        x = a * x + matmul("...ik,...kj->...ij", p, x)
    return x


def standard_flops(m: int, n: int, steps: int) -> int:
    """Multiply-adds counted twice, for one matrix."""
    m, n = min(m, n), max(m, n)
    return steps * (4 * m * m * n + 2 * m**3)
