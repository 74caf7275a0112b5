"""Loss, gradients, updates, router biases and clip factors do not depend on the mesh, on layers being scanned, on what is
recomputed, on microbatches; with the grid and without. Four combinations in `make test`, every one in `make test-slow`."""

import itertools
from functools import lru_cache

import numpy as np
import pytest

from tests.scale.networks import RUN, Measured, batch, on_mesh, take_step, weights, with_

MESHES = {
    "one": {},
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "expert": {"expert": 4},
    "context": {"context": 2},
    "tensor": {"tensor": 2},
    "fsdp x expert": {"fsdp": 2, "expert": 2},
    "data x fsdp x expert": {"data": 2, "fsdp": 2, "expert": 2},
}
FACTORS = {"layers": ("scan", "unroll"), "remat": ("none", "names"), "accumulate": (1, 4), "grid": ("int4", "none")}

SUMS = 1e-5
"""Relative to the largest entry of an array: sums of at most 512 float32 terms in another order, through three layers
forward and back; 3e-6 is what is seen."""

UPDATES = 1e-4
"""Relative to the largest entry: Newton-Schulz multiplies small singular values by up to 3.4 a step, three steps here, and
with them the difference of the gradients: 40 * 2e-6. AdamW's first step divides a gradient by |gradient| + adam_eps, which would
multiply differences by largest gradient / adam_eps; with the 1e-2 of these runs that is about 1."""


def config(mesh: str, layers: str, remat: str, accumulate: int, grid: str):
    cfg = with_(on_mesh(RUN, **MESHES[mesh]), "train", layers=layers, remat=remat, accumulate=accumulate)
    return with_(cfg, "quant", grid=grid)


@lru_cache
def reference(grid: str) -> Measured:
    cfg = config("one", "scan", "none", 1, grid)
    return take_step(cfg, weights(cfg), batch(cfg))


def assert_same(mine: Measured, other: Measured) -> None:
    np.testing.assert_allclose(mine.loss, other.loss, rtol=SUMS)
    for path, grad in other.gradients.items():
        np.testing.assert_allclose(mine.gradients[path], grad, rtol=0, atol=SUMS * np.abs(grad).max() + 1e-12, err_msg=path)
    for path, update in other.updates.items():
        np.testing.assert_allclose(mine.updates[path], update, rtol=0, atol=UPDATES * np.abs(update).max() + 1e-12, err_msg=path)
        if path.endswith("router_bias"):
            np.testing.assert_array_equal(mine.updates[path], update)
    np.testing.assert_array_equal(mine.aux.moe.expert_counts, other.aux.moe.expert_counts)
    np.testing.assert_allclose(mine.aux.moe.balance_loss, other.aux.moe.balance_loss, rtol=SUMS)
    np.testing.assert_allclose(mine.aux.attention.max_logit, other.aux.attention.max_logit, rtol=SUMS)
    assert mine.clipped.clipped == other.clipped.clipped
    np.testing.assert_allclose(mine.clipped.smallest, other.clipped.smallest, rtol=SUMS)


FAST = [
    ("data x fsdp x expert", "unroll", "names", 1, "int4"),
    ("context", "scan", "names", 4, "int4"),
    ("tensor", "unroll", "none", 4, "none"),
    ("expert", "scan", "none", 1, "none"),
]
"""Every axis alone or with others, both values of every factor."""

EVERY = [c for c in itertools.product(MESHES, *FACTORS.values()) if c not in FAST]


def check(combination) -> None:
    cfg = config(*combination)
    assert_same(take_step(cfg, weights(cfg), batch(cfg)), reference(combination[-1]))


@pytest.mark.parametrize("combination", FAST, ids=lambda c: " ".join(map(str, c)))
def test_the_mesh_changes_nothing(combination):
    check(combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", EVERY, ids=lambda c: " ".join(map(str, c)))
def test_nothing_changes_anything(combination):
    check(combination)


def test_the_batch_exercises_what_is_compared():
    """Heads are clipped and others are not, every expert has another load, a row is empty."""
    one = reference("int4")
    assert 0 < one.clipped.clipped < one.aux.attention.max_logit.size and one.clipped.smallest < 1
    assert len(np.unique(one.aux.moe.expert_counts[0])) > 3 and (batch(RUN)["segments"] == 0).all(axis=1).any()
