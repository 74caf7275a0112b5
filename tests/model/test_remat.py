"""Remat policies, and groups of heads that are expanded one after the other, change memory, not numbers."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import mla
from model.remat import POLICIES
from model.transformer import bind
from quant.served import Serving
from tests.model.networks import call_for, random_params, small
from train.plan.census import census

CFG = small(num_hidden_layers=4)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 200)).astype(np.int32)


def grad_of(policy):
    def loss(params):
        return jnp.mean(bind(CFG, params)(TOKENS, call_for(TOKENS, remat=policy))[0] ** 2)

    return jax.jit(jax.grad(loss))


@pytest.fixture(scope="module")
def kept_everything():
    params = random_params(CFG, std=0.2)
    run = grad_of("none").lower(params).compile()
    return params, run(params), run.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("none", "offload")])
def test_same_gradients_less_memory(policy, kept_everything):
    params, want, memory = kept_everything
    run = grad_of(policy).lower(params).compile()
    got = run(params)
    for path in want:
        # Fusion differs between the programs, so float32 sums do; routing is the same.
        np.testing.assert_allclose(got[path], want[path], atol=2e-6 + 1e-5 * np.abs(want[path]).max(), err_msg=path)
    assert run.memory_analysis().temp_size_in_bytes < memory


def test_what_is_kept_is_not_computed_again(kept_everything):
    """FLOPs of the compiled programs: each policy that keeps more does less."""
    params, *_ = kept_everything
    counts = [
        census(grad_of(p).lower(params).compile().as_text(), causal=True).flops for p in ("layer", "names", "hidden", "none")
    ]
    assert counts == sorted(set(counts), reverse=True)


def test_heads_are_expanded_in_groups(kept_everything, monkeypatch):
    """As where the keys and values of all heads over a long row would not fit."""
    params, want, _ = kept_everything
    monkeypatch.setattr(mla, "EXPANDED", 1)
    got = grad_of("names")(params)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=2e-6 + 1e-5 * np.abs(want[path]).max(), err_msg=path)


def test_groups_are_as_few_as_fit():
    assert mla.head_groups(64, 4 * 4096 * 320 * 2) == 1  # Kimi K2, four rows of 4096
    assert mla.head_groups(64, 262144 * 320 * 2) == 8
    assert mla.head_groups(6, mla.EXPANDED // 4) == 2 and mla.head_groups(5, mla.EXPANDED // 4) == 5
    assert mla.head_groups(2, mla.EXPANDED * 9) == 2  # a head cannot be cut


def test_unknown_policy():
    with pytest.raises(ValueError, match="no remat policy"):
        grad_of("nothing").lower(random_params(CFG))


@pytest.mark.parametrize("policy", ["none", "hidden"])
def test_a_settled_grid_does_not_look_at_its_share(policy):
    """Its program reads masters for their grid values only. A share of 1 that it was given would be hidden from the compiler by
    the barriers of rematerialisation, and masters read again for the case that it is less."""
    params = random_params(CFG)

    def scalars(settled):
        def loss(params, amount):
            serving = Serving(dtype="bfloat16", grid="int4", group_size=16)
            call = replace(call_for(TOKENS, serving=serving, remat=policy), amount=amount, settled=settled)
            return jnp.mean(bind(CFG, params)(TOKENS, call)[0] ** 2)

        text = jax.jit(jax.grad(loss)).lower(params, jnp.float32(1)).as_text()
        return re.search(r"@main\((.*)\) ->", text).group(1).count("tensor<f32>")

    assert (scalars(settled=False), scalars(settled=True)) == (1, 0)
