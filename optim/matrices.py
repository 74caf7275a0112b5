"""Stored arrays as batches of logical matrices, and back. Derived from `ParamSpec.matrix` and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from configs.param_spec import ParamSpec


@dataclass(frozen=True)
class MatrixLayout:
    """Which axes of an array are batch, rows and columns, and into which blocks the last column axis is cut.

    Batch axes are never merged with one another here: that would break the sharding of an array that is split over
    one of them.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    splits: tuple[int, ...]

    @classmethod
    def of(cls, spec: ParamSpec, split_choice: bool = True) -> MatrixLayout:
        """`split_choice`: whether a split that the configuration may decline is taken (optim.split_kv_a)."""
        matrix = spec.matrix
        whole = spec.shape[spec.axis(matrix.cols[-1])]
        declined = matrix.split_by_choice and not split_choice
        return cls(
            batch=tuple(spec.axis(a) for a in spec.batch_axes()),
            rows=tuple(spec.axis(a) for a in matrix.rows),
            cols=tuple(spec.axis(a) for a in matrix.cols),
            splits=(whole,) if matrix.split is None or declined else matrix.split,
        )

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch + self.rows + self.cols

    @property
    def lead(self) -> int:
        """How many axes in front are batch axes."""
        return next(i for i in range(len(self.order)) if i not in self.batch)

    def blocks(self, x: Array) -> list[Array]:
        """One [batch..., m, n] array per block of columns."""
        x = x.transpose(self.order)
        batch = x.shape[: len(self.batch)]
        m = math.prod(x.shape[len(self.batch) : len(self.batch) + len(self.rows)])
        out, start = [], 0
        for size in self.splits:
            piece = x[..., start : start + size] if len(self.splits) > 1 else x
            n = math.prod(piece.shape[len(self.batch) + len(self.rows) :])
            out.append(piece.reshape(*batch, m, n))
            start += size
        return out

    def assemble(self, blocks: list[Array], shape: tuple[int, ...]) -> Array:
        """Inverse of `blocks` for an array of `shape`."""
        lead = [shape[a] for a in self.order[:-1]]
        x = (
            jnp.concatenate([b.reshape(*lead, size) for b, size in zip(blocks, self.splits)], axis=-1)
            if len(blocks) > 1
            else blocks[0].reshape(*lead, self.splits[0])
        )
        return x.transpose([self.order.index(i) for i in range(len(self.order))])

    def matrices(self, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(count, m, n) of every block."""
        count = math.prod(shape[a] for a in self.batch)
        m = math.prod(shape[a] for a in self.rows)
        outer = math.prod(shape[a] for a in self.cols[:-1])
        return [(count, m, outer * size) for size in self.splits]


def is_expert(spec: ParamSpec) -> bool:
    """Routed experts: every index of the experts axis is a matrix of its own."""
    return spec.matrix is not None and "experts" in spec.batch_axes()
