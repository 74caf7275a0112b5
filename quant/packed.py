"""The packed projections of a checkpoint: three tensors each, decoded without the code that encoded them.

Values are computed in numpy, `bf16(code * scale)`, as transformers and the engines do it. That keeps the judge apart
from the accused: quant/grid.py made the file, and is not used to read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from quant.pack import PER_WORD, unpack
from quant.tensor_file import Checkpoint

PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""Suffixes of the tensors of one packed projection."""


@dataclass(frozen=True)
class Packed:
    """One projection; `stem` is its module's name, shape is [out, in] as the packed words imply it."""

    stem: str
    shape: tuple[int, int]
    group: int

    def codes(self, checkpoint: Checkpoint) -> np.ndarray:
        """[out, in] int8."""
        return unpack(checkpoint.read(f"{self.stem}.weight_packed"))

    def scales(self, checkpoint: Checkpoint) -> np.ndarray:
        """[out, in/group] in the dtype of the file."""
        return checkpoint.read(f"{self.stem}.weight_scale")

    def values(self, checkpoint: Checkpoint) -> np.ndarray:
        """[out, in] float32: bf16(code * scale)."""
        return dequantized(self.codes(checkpoint), self.scales(checkpoint).astype(np.float32))


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bf16(code * scale) as float32, for codes [out, in] and float32 scales [out, in/group]."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32) * scales[..., None]
    return grouped.astype(ml_dtypes.bfloat16).astype(np.float32).reshape(codes.shape)


def projections(checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every projection whose words and scales fit together, by module name; ill-formed ones are left out."""
    found = {}
    for name, entry in checkpoint.tensors.items():
        stem, _, part = name.rpartition(".")
        scale = f"{stem}.weight_scale"
        if part != "weight_packed" or entry.dtype != "I32" or len(entry.shape) != 2 or scale not in checkpoint:
            continue
        out, inputs = entry.shape[0], entry.shape[1] * PER_WORD
        scales = checkpoint.shape(scale)
        if len(scales) == 2 and scales[0] == out and scales[1] and inputs % scales[1] == 0:
            found[stem] = Packed(stem, (out, inputs), inputs // scales[1])
    return dict(sorted(found.items()))
