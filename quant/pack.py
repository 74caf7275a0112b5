"""Codes to words and back: eight 4-bit codes in one 32-bit word, as compressed-tensors' "pack-quantized" stores them.

A code q of [-8, 7] is stored as the nibble q + 8. Element j of a row lies in word j // 8 at bit 4 * (j % 8), lowest
nibble first, words little-endian: so each byte holds an even element low and its right neighbour high.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int8, Int32

PER_WORD = 8
"""Codes in a word."""


def pack(codes: Int8[np.ndarray, "... in_"]) -> Int32[np.ndarray, "... words"]:
    """[..., I] int8 codes in [-8, 7] -> [..., I/8] int32 words; I must be a multiple of 8."""
    if codes.shape[-1] % PER_WORD:
        raise ValueError(f"{codes.shape[-1]} codes in a row do not fill 32-bit words; a multiple of {PER_WORD} does")
    nibbles = (codes + np.int8(8)).view(np.uint8)
    if codes.size and nibbles.max() > 15:
        raise ValueError(f"codes range over [{codes.min()}, {codes.max()}], but four bits hold only [-8, 7]")
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return np.ascontiguousarray(pairs).view("<i4")


def unpack(words: Int32[np.ndarray, "... words"]) -> Int8[np.ndarray, "... in_"]:
    """[..., I/8] int32 words -> [..., I] int8 codes in [-8, 7]."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    codes = np.empty((*pairs.shape[:-1], 2 * pairs.shape[-1]), np.int8)
    codes[..., 0::2] = pairs & 15
    codes[..., 1::2] = pairs >> 4
    return codes - np.int8(8)
