"""Packing against hand-computed words, and the quantiser against hashes of a published definition's output."""

import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quant import grid
from quant.pack import pack, unpack


def golden_weights() -> np.ndarray:
    n = np.arange(32 * 64)
    return ((((37 * n) % 2003) - 1001).astype(np.float32) / np.float32(1000)).astype(np.float32).reshape(32, 64)


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_lowest_nibble_comes_first():
    words = pack(np.arange(-8, 8, dtype=np.int8))
    assert [hex(w & 0xFFFFFFFF) for w in words.tolist()] == ["0x76543210", "0xfedcba98"]


def test_unpack_inverts_pack():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 5, 64)).astype(np.int8)
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_words_are_int4_after_one_xor():
    codes = np.random.default_rng(1).integers(-8, 8, (4, 64)).astype(np.int8)
    words = jnp.asarray(pack(codes).view(np.uint32))
    as_int4 = jax.lax.bitcast_convert_type(words ^ jnp.uint32(0x88888888), jnp.int4)
    np.testing.assert_array_equal(np.asarray(as_int4).reshape(4, 64).astype(np.int8), codes)


@pytest.mark.parametrize("codes, message", [(np.full((1, 8), 9, np.int8), "four bits"), (np.zeros((1, 9), np.int8), "fill")])
def test_bad_codes_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        pack(codes)


def test_golden_quantiser_output():
    codes, scales = jax.jit(grid.quantize, static_argnums=(1, 2))(golden_weights(), -1, 32)
    words, bf16_scales = pack(np.asarray(codes)), np.asarray(scales).astype(ml_dtypes.bfloat16)
    values = np.asarray(grid.dequantize(codes, scales, -1, 32)).astype(ml_dtypes.bfloat16)
    assert bf16_scales.view(np.uint16)[0].tolist() == [0x3E12, 0x3E12]
    assert [hex(w & 0xFFFFFFFF) for w in words[0, :4].tolist()] == ["0x33222111", "0x55444433", "0x77666655", "0x99988877"]
    assert sha(words) == "c76df1b9ad88da2eb3db1fab45f0dcb4d9d30fe47dab24922ad5d7a5efd84bbf"
    assert sha(bf16_scales) == "4aa2635f37cc59da21e5f6f1d7a9507917fac2d7da131ff76a44ad187165aaf4"
    assert sha(values) == "dcf1e5328ec07afcf5f53bd1993e0876634dd2d8d72050278509ba42a77b2392"


def test_every_bf16_absmax_is_a_fixed_point():
    # Every positive finite bf16 but the largest, whose scale rounds up so far that seven of them overflow.
    bits = np.arange(0x0001, 0x7F7F, dtype=np.uint16)
    absmax = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    rng = np.random.default_rng(0)
    x = absmax[:, None] * rng.uniform(-1, 1, (absmax.size, 32)).astype(np.float32)
    x[:, 0] = absmax
    codes, scales = grid.quantize(jnp.asarray(x), -1, 32)
    again, scales_again = grid.quantize(grid.dequantize(codes, scales, -1, 32), -1, 32)
    differ = np.flatnonzero(
        (np.asarray(codes) != np.asarray(again)).any(-1) | (np.asarray(scales) != np.asarray(scales_again))[:, 0]
    )
    assert differ.size == 0, [hex(b) for b in bits[differ[:5]]]
