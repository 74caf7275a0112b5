"""The numbers in a directory: finite, in range, on which grid, and whether training may continue from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import ml_dtypes
import numpy as np

from quant.codecs import KIMI7, jitted
from quant.findings import Report
from quant.packed import Packed, dequantized
from quant.tensor_file import Checkpoint

_quantize = jitted(KIMI7)


def grid_of(codes: np.ndarray, scales: np.ndarray) -> str:
    """Which rule wrote a projection: kimi7, ct75, or other.

    absmax/7 reaches 7 in every group that is not zero and never -8; absmax/7.5 reaches 7 or -8 in every such group,
    and -8 somewhere in any matrix of some size.
    """
    peaks = np.abs(codes.reshape(*scales.shape, -1).astype(np.int16)).max(-1)
    live = peaks > 0
    if codes.min(initial=0) >= -7:
        return "kimi7" if (peaks[live] == 7).all() else "other"
    return "ct75" if (peaks[live] >= 7).all() else "other"


def is_fixed_point(codes: np.ndarray, scales: np.ndarray) -> bool:
    """Whether quantising the values on the training grid returns exactly these codes and scales."""
    again, scales_again = _quantize(dequantized(codes, scales), -1, codes.shape[1] // scales.shape[1])
    # An all-zero group may carry any scale: nothing depends on it.
    live = codes.reshape(*scales.shape, -1).any(-1)
    return bool((np.asarray(again) == codes).all() and (np.asarray(scales_again) == scales)[live].all())


def check_values(
    checkpoint: Checkpoint, packed: dict[str, Packed], report: Report, progress: Callable[[int, int], None] | None = None
) -> None:
    """Scales and codes of every packed projection, and every plain tensor for infinities and zeros."""
    parts = {f"{stem}.{p}" for stem in packed for p in ("weight_packed", "weight_scale", "weight_shape")}
    plain = [n for n in checkpoint.tensors if n not in parts]
    grids, moved = Counter(), 0
    for done, projection in enumerate(packed.values(), 1):
        kind, fixed = _check_projection(checkpoint, projection, report)
        grids[kind] += 1
        moved += not fixed
        if progress is not None:
            progress(done, len(packed) + len(plain))
    for done, name in enumerate(plain, len(packed) + 1):
        _check_plain(checkpoint, name, report)
        if progress is not None:
            progress(done, len(packed) + len(plain))
    if packed:
        _conclude(grids, moved, len(packed), report)


def _check_projection(checkpoint: Checkpoint, p: Packed, report: Report) -> tuple[str, bool]:
    codes, scales = p.codes(checkpoint), p.scales(checkpoint).astype(np.float32)
    if not np.isfinite(scales).all():
        report.error("scales", f"{p.stem} has {(~np.isfinite(scales)).sum()} scales that are not finite numbers")
        return "other", False
    live = codes.reshape(*scales.shape, -1).any(-1)
    if (scales[live] == 0).any():
        report.error("scales", f"{p.stem} has {(scales[live] == 0).sum()} scales of zero over codes that are not")
    if (scales < 0).any():
        report.warn("scales", f"{p.stem} has {(scales < 0).sum()} negative scales: legal, but untested in engines")
    if not live.any():
        report.warn("codes", f"all codes of {p.stem} are zero: the projection does nothing")
    as_bf16 = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    fixed = bool((as_bf16 == scales).all()) and is_fixed_point(codes, scales)
    return grid_of(codes, scales), fixed


def _check_plain(checkpoint: Checkpoint, name: str, report: Report) -> None:
    values = checkpoint.read(name)
    if values.dtype.kind in "iub":
        return
    values = values.astype(np.float32)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        report.error("values", f"{name} has {bad} values that are not finite numbers")
    elif not values.any() and not name.endswith("e_score_correction_bias"):
        report.warn("values", f"{name} is all zeros")


def _conclude(grids: Counter, moved: int, total: int, report: Report) -> None:
    names = {"kimi7": "absmax/7, codes of [-7, 7]", "ct75": "absmax/7.5, codes of [-8, 7]", "other": "no absmax grid"}
    report.note("grid", "; ".join(f"{n} projections on {names[k]}" for k, n in grids.most_common()))
    if grids["kimi7"] and len(grids) > 1:
        report.warn("grid", f"{total - grids['kimi7']} of {total} projections are not on the grid of the others")
    if moved:
        report.note(
            "fixed point",
            f"{moved} of {total} projections change when quantised again: serving is fine, "
            "continued training on the grid needs the original masters",
        )
