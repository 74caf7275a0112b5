"""What instructions are given: registers, constants and addresses, as [32] of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

LANES = np.arange(32, dtype=np.uint32)
TYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "pred": np.bool_,
    **{f"{sign}{8 * size}": np.dtype(f"{kind}{size}").type for sign, kind in ("bu", "uu", "si") for size in (2, 4, 8)},
}


def names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def source(operand: str, kind, symbols: dict[str, int]) -> Callable:
    """What reads an operand as [32] of a type."""
    bits = np.dtype(f"u{np.dtype(kind).itemsize}")
    if operand == "%tid.x":
        return lambda warp: LANES + np.uint32(32 * warp.number)
    if operand.startswith("%ctaid"):
        return lambda warp: np.full(32, warp.block.place["xyz".index(operand[-1])], np.uint32)
    if operand.startswith("%"):
        return lambda warp: warp.registers[operand].view(kind)
    if kind == np.bool_:
        constant = np.full(32, int(operand) != 0)
    else:
        number = (
            symbols[operand]
            if operand in symbols
            else int(operand[2:].rstrip("U"), 16)
            if operand[:2] in ("0f", "0x")
            else int(operand)
        )
        constant = np.full(32, number % (1 << 8 * bits.itemsize), bits).view(kind)
    return lambda warp: constant


def address(operand: str, symbols: dict[str, int]) -> Callable:
    """[32] byte addresses: [register], [register+offset]."""
    name, offset = re.fullmatch(r"\[?([^]+]+)(?:\+(-?\d+))?\]?", operand.replace(" ", "")).groups()
    if name in symbols:
        return lambda warp: np.full(32, symbols[name] + int(offset or 0), np.int64)
    return lambda warp: warp.registers[name].astype(np.int64) + int(offset or 0)
