"""Where every stored value lies in a Hugging Face checkpoint: read from the ParamSpec table, used by export and import.

A stored array is cut into blocks, one for each index of its `layers` and `experts` axes that the tensor name spells
out, and a block into one tensor, or into several where `HFTensor.index` fixes a further axis (the halves of gate_up).
Inside a tensor the axes named by `Matrix.rows` are the inputs, all others, in stored order, the outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.param_spec import HFTensor, ParamSpec, Specs


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor and its place in a stored array.

    name    of the tensor, without the suffixes of a packed one: `...gate_proj.weight`
    path    of the stored array
    block   leading indices (layer, expert) that select the block in the stored array
    within  numpy index of the tensor inside the block
    shape   of the tensor in the checkpoint: [out, in], or [n]
    layer   of the network; None for embedding, head and final norm
    """

    name: str
    path: str
    spec: ParamSpec
    block: tuple[int, ...]
    within: tuple[int | slice, ...]
    shape: tuple[int, ...]
    layer: int | None
    _order: tuple[int, ...]
    _sizes: tuple[int, ...]
    _transposed: bool

    def to_hf(self, block: np.ndarray) -> np.ndarray:
        """The tensor (a view where possible) from a block of the stored array."""
        rows_first = block[self.within].transpose(self._order)
        if not self._transposed:
            return rows_first.reshape(self.shape)
        # The inputs may be fewer than the weight's: a block of scales has one per group.
        return rows_first.reshape(-1, self.shape[0]).T

    def into(self, tensor: np.ndarray, block: np.ndarray) -> None:
        """Write the tensor's values to their place in a block of the stored array; the inverse of `to_hf`."""
        rows_first = (tensor.T if self._transposed else tensor).reshape([self._sizes[a] for a in self._order])
        block[self.within] = rows_first.transpose(np.argsort(self._order))


def _slot(path: str, spec: ParamSpec, hf: HFTensor, lead: tuple[str, ...], block: tuple[int, ...]) -> Slot:
    names, sizes = spec.axes[len(lead) :], spec.shape[len(lead) :]
    fixed = dict(hf.index)
    within = tuple(fixed.get(a, slice(None)) for a in names)
    kept = [(a, n) for a, n in zip(names, sizes) if a not in fixed]
    rows = [i for i, (a, _) in enumerate(kept) if (a in spec.matrix.rows if spec.matrix else i == 0)]
    order = tuple(rows + [i for i in range(len(kept)) if i not in rows])
    kept_sizes = tuple(n for _, n in kept)
    shape = (math.prod(kept_sizes[i] for i in rows), math.prod(kept_sizes[i] for i in order[len(rows) :]))
    transposed = hf.transposed and len(kept) > 1
    shape = kept_sizes if len(kept) == 1 else shape[::-1] if transposed else shape
    where = dict(zip(lead, block))
    layer = spec.layers[where.get("layers", 0)] if spec.layers else None
    name = hf.name.format(layer=layer, expert=where.get("experts"))
    return Slot(name, path, spec, block, within, shape, layer, order, kept_sizes, transposed)


def slots_of(path: str, spec: ParamSpec) -> Iterator[Slot]:
    """Every tensor of one stored array, block by block."""
    spelled = [a for a, key in (("layers", "{layer}"), ("experts", "{expert}")) if a in spec.axes and key in spec.hf[0].name]
    lead = tuple(spelled)
    if spec.axes[: len(lead)] != lead:
        raise ValueError(f"{path}: axes {lead} are named in {spec.hf[0].name} and must come first, not {spec.axes}")
    for block in itertools.product(*(range(n) for n in spec.shape[: len(lead)])):
        for hf in spec.hf:
            yield _slot(path, spec, hf, lead, block)


def all_slots(specs: Specs) -> list[Slot]:
    """Every tensor of the checkpoint in file order: what belongs to no layer, then layer by layer, experts ascending.

    Raises ValueError where two slots share a name or a stored array is not covered exactly once.
    """
    slots: list[Slot] = []
    for path, spec in specs.items():
        mine = list(slots_of(path, spec))
        covered = sum(math.prod(s.shape) for s in mine)
        if covered != spec.size:
            raise ValueError(f"{path}: its Hugging Face tensors cover {covered} of {spec.size} values")
        slots += mine
    seen: dict[str, str] = {}
    for slot in slots:
        if slot.name in seen:
            raise ValueError(f"{slot.name} is claimed by {seen[slot.name]} and by {slot.path}")
        seen[slot.name] = slot.path
    # The sort is stable: tensors of one block stay neighbours, so a reader of blocks reads each once.
    return sorted(slots, key=lambda s: (-1 if s.layer is None else s.layer, s.spec.on_grid, s.block[-1] if s.spec.on_grid else 0))
