"""What the framework knows about a parameter: one `ParamSpec` per stored array, declared where the layer creates it.

Five readers share the table of specs and nothing else: sharding rules, Muon's routing, quantisation coverage,
the checkpoint layout, and import/export. No reader matches names, regular expressions or `ndim`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Matrix:
    """The logical matrices inside a stored array: `rows` are inputs, `cols` outputs, every other axis a batch axis.

    The experts' `[layers, experts, embed, gate_up, expert_hidden]` with rows `embed` and cols `expert_hidden`
    is layers*experts*2 matrices. `split` cuts the columns further, into blocks that are matrices of their own;
    `split_by_choice` marks a split that optim.split_kv_a may decline.
    """

    rows: tuple[str, ...]
    cols: tuple[str, ...]
    split: tuple[int, ...] | None = None
    split_by_choice: bool = False


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint that is one slice of a stored array.

    `name` holds `{layer}` and `{expert}` where the stored array has those axes. `index` fixes the position on a
    named axis (the half of `gate_up`). `transposed`: torch keeps [out, in], we keep [in, out].
    """

    name: str
    index: tuple[tuple[str, int], ...] = ()
    transposed: bool = True


@dataclass(frozen=True)
class ParamSpec:
    """One stored array.

    shape, axes      sizes and logical axis names, in the same order
    init             standard deviation of a normal, or the constant "zeros" / "ones"
    update           the rule that changes it: muon, adamw, or router_bias (from expert loads, no gradient)
    matrix           which axes form matrices; required for muon
    on_grid          the routed experts: trained and served on the INT4 grid, groups along the matrix rows
    served           dtype in the exported checkpoint; None follows model.dtype
    decay            whether decoupled weight decay applies
    clip_powers      (size, power) blocks of the last axis that QK-Clip multiplies by gamma**power, one gamma per
                     index of the "heads" axis; empty where the clip does not reach
    hf               where its values live in a Hugging Face checkpoint
    layers           indices of the network layers that a leading "layers" axis, or an unstacked layer, stands for
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | Literal["zeros", "ones"]
    update: Literal["muon", "adamw", "router_bias"]
    hf: tuple[HFTensor, ...]
    matrix: Matrix | None = None
    on_grid: bool = False
    served: Literal["float32"] | None = None
    decay: bool = True
    clip_powers: tuple[tuple[int, float], ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        problems = []
        if len(self.shape) != len(self.axes):
            problems.append(f"{len(self.axes)} axis names for shape {self.shape}")
        if len(set(self.axes)) != len(self.axes):
            problems.append(f"an axis name is used twice in {self.axes}")
        if self.update == "muon" and self.matrix is None:
            problems.append("muon needs a matrix")
        if self.matrix is not None:
            missing = [a for a in self.matrix.rows + self.matrix.cols if a not in self.axes]
            if missing:
                problems.append(f"matrix axes {missing} are not among {self.axes}")
            elif self.matrix.split and sum(self.matrix.split) != self.shape[self.axes.index(self.matrix.cols[-1])]:
                problems.append(f"split {self.matrix.split} does not add up to axis {self.matrix.cols[-1]}")
        if self.on_grid and self.matrix is None:
            problems.append("a parameter on the grid needs a matrix, its rows carry the groups")
        if self.clip_powers and ("heads" not in self.axes or sum(n for n, _ in self.clip_powers) != self.shape[-1]):
            problems.append(f"clip_powers {self.clip_powers} need a heads axis and must add up to the last axis")
        if not self.hf:
            problems.append("no Hugging Face name")
        if problems:
            raise ValueError(f"incomplete ParamSpec {self.hf}: " + "; ".join(problems))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def axis(self, name: str) -> int:
        """Position of a logical axis."""
        return self.axes.index(name)

    def batch_axes(self) -> tuple[str, ...]:
        """Axes whose every index is a matrix of its own."""
        return tuple(a for a in self.axes if a not in self.matrix.rows + self.matrix.cols)


Specs = Mapping[str, ParamSpec]
"""Path of a stored array (`moe.mlp.experts_gate_up`) to its spec; the parameters are a flat dict with the same keys."""
