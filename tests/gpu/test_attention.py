"""Attention on a Hopper GPU against the definition in float32, over packed rows. One command there: make test-gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.platforms import platform_of
from model import attention
from model.kernels import attention_gpu
from tests.model.test_attention import packed
from tests.model.test_attention_gpu import compare, operands

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(platform_of(jax.devices()[0]) != "hopper", reason="needs a Hopper GPU")]


@pytest.fixture(autouse=True)
def exact_products():
    """The definition multiplies in float32, not in the tensor cores' shorter formats."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("kind", ["whole", "packed", "empty row"])
@pytest.mark.parametrize(
    "B, S, H, d, v, scale",
    [
        (2, 1024, 4, 192, 128, 192**-0.5),  # Moonlight's heads
        (
            2,
            1024,
            2,
            192,
            128,
            0.1308609,
        ),  # Kimi K2's: with YaRN's factor, by which the logit of what is not seen is no round number
        (2, 1000, 2, 192, 128, 0.1352337),  # DeepSeek-V3's; the last tile hangs over
        (3, 300, 2, 128, 128, 128**-0.5),
        (2, 640, 3, 64, 64, 0.125),
        (2, 512, 1, 192, 64, 0.1),
        (1, 4096, 16, 192, 128, 0.1308609),
    ],
)
def test_against_the_definition(B, S, H, d, v, scale, kind):
    """Output, gradients, largest logit."""
    args, exact = operands(B, S, H, d, v)
    compare(attention_gpu.attend, args, exact, packed(B, S, kind), jnp.arange(S), scale)


def test_some_of_a_rows_queries():
    """Two chunks far apart, as a device of the context axis holds them."""
    S, at = 2048, np.r_[256:512, 1536:1792]
    args, exact = operands(2, S, 4, 192, 128)
    for x in (args, exact):
        x[0], x[3] = x[0][:, at], x[3][:, at]
    compare(attention_gpu.attend, args, exact, packed(2, S, "packed"), jnp.asarray(at), 192**-0.5)


def test_same_bits_every_time():
    """No sum depends on which block comes first."""
    (q, k, v, g), _ = operands(2, 2048, 8, 192, 128)
    segments, at = packed(2, 2048, "packed"), jnp.arange(2048)

    @jax.jit
    def run(q, k, v, g):
        (out, top), pull = jax.vjp(lambda *x: attention_gpu.attend(*x, segments, at, 192**-0.5), q, k, v)
        return out, top, *pull((g, jnp.zeros_like(top)))

    first = run(q, k, v, g)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, run(q, k, v, g), first)


def test_long_rows():
    """32,768 positions in many documents: the same as the tiled XLA form, whose memory is as small."""
    (q, k, v, g), _ = operands(1, 32768, 4, 192, 128)
    segments = jnp.asarray(np.repeat(np.arange(1, 65), 512)[None], jnp.int32)
    at = jnp.arange(32768)
    for name, x, y in zip(
        ("out", "top"),
        attention_gpu.attend(q, k, v, segments, at, 192**-0.5),
        attention.IMPLEMENTATIONS["chunked"](q, k, v, segments, at, 192**-0.5, 512),
        strict=True,
    ):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.abs(x - y).max() <= (0.012 if name == "out" else 2e-6) * np.abs(y).max(), name
