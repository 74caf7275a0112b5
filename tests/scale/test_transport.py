"""Every expert transport against one device that has all experts: outputs and gradients, for routings that are even, that
overflow every buffer, and that send all tokens to one device; and where a program of it must compile, it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.schema import MeshConfig
from model import experts, transport
from model.shards import shards_of
from model.transport import gather, rounds
from train.mesh import make_mesh

N, D, F, E, K, WAYS = 24, 16, 8, 16, 3, 4
"""Tokens of one device, widths, experts in all, experts per token, devices."""


def inputs(routing: str):
    rng = np.random.default_rng(3)
    everyone = WAYS * N
    if routing == "even":
        chosen = np.stack([rng.permutation(E)[:K] for _ in range(everyone)])
    elif routing == "one device":
        chosen = np.stack([E // WAYS + rng.permutation(E // WAYS)[:K] for _ in range(everyone)])
    else:  # one expert has every token, and one device sends all its pairs to one other
        chosen = np.stack([np.r_[5, 6 + rng.permutation(E - 6)[: K - 1]] for _ in range(everyone)])
        chosen[:N] = [12, 13, 15]
    arrays = (
        rng.standard_normal((everyone, D)),
        rng.random((everyone, K)),
        rng.standard_normal((E, D, 2 * F)) / 4,
        rng.standard_normal((E, F, D)) / 4,
    )
    x, gates, gate_up, down = (a.astype(np.float32) for a in arrays)
    return (x, gates, (gate_up, down)), chosen.astype(np.int32), rng.standard_normal((everyone, D)).astype(np.float32)


def run(name: str, variables, chosen, g, mesh=None):
    """The output and the gradients of its product with g."""

    def local(variables, chosen, g):
        def total(variables):
            x, gates, weights = variables
            if name == "one device":
                out = experts.apply(x, chosen, gates, weights, "cpu")
            else:
                out = transport.routed(x, chosen, gates, weights, shards_of(mesh), "cpu", name)
            return jnp.sum(out * g), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(variables)
        return out, grads

    if mesh is not None:
        rows = P("expert")
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=((rows, rows, (rows, rows)), rows, rows),
            out_specs=(rows, (rows, rows, (rows, rows))),
            check_vma=False,
        )
    return jax.jit(local)(variables, chosen, g)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, expert=WAYS), jax.devices()[:WAYS])


@pytest.mark.parametrize("name", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("routing", ["even", "skewed", "one device"])
def test_against_one_device(mesh, name, routing, monkeypatch):
    variables, chosen, g = inputs(routing)
    got, want = run(name, variables, chosen, g, mesh), run("one device", variables, chosen, g)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 sums of at most 96 terms in another order
        np.testing.assert_allclose(mine, other, rtol=0, atol=3e-6 * np.abs(other).max())


def test_pieces_change_nothing(mesh, monkeypatch):
    """As on chips whose wires work beside their cores: each piece has buffers and rounds of its own."""
    variables, chosen, g = inputs("skewed")
    want = run("one device", variables, chosen, g)
    monkeypatch.setattr(gather, "pieces", lambda *_: 3)
    for mine, other in zip(jax.tree.leaves(run("all_gather", variables, chosen, g, mesh)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=3e-6 * np.abs(other).max())


def test_pieces_leave_experts_enough_rows():
    assert gather.pieces(16384, 8, 24, "tpu") == 4  # Kimi K2, four rows of 4096 a device, experts over 16: 5461 rows each
    assert gather.pieces(8192, 6, 32, "tpu") == 1
    assert gather.pieces(16384, 8, 24, "hopper") == gather.pieces(24, 3, 4, "tpu") == 1
    assert gather.pieces(3 * 4096 + 1, 8, 8, "tpu") == 1  # no part divides


def test_no_routing_fits_the_buffer_of_the_skewed_test():
    """What the tests above rely on: the buffers are bounded, and these routings need several rounds of them."""
    for routing in ("skewed", "one device"):
        _, chosen, _ = inputs(routing)
        per_pair = max(int(np.sum(chosen[d * N : (d + 1) * N] // (E // WAYS) == p)) for d in range(WAYS) for p in range(WAYS))
        assert per_pair > 2 * rounds.room(N * K / WAYS, N * K)
        assert max(np.bincount(chosen.reshape(-1) // (E // WAYS))) > rounds.room(N * K, WAYS * N * K)


def test_every_pair_has_one_slot_in_one_round():
    rng = np.random.default_rng(0)
    destination = rng.integers(0, 5, (40, 3)).astype(np.int32)  # 4 is nowhere
    lines = rounds.queues(jnp.asarray(destination), 4)
    seen = np.zeros(destination.size, int)
    for number in range(8):
        window = lines.window(jnp.int32(number), 6, "cpu")
        slots = np.asarray(window.slot_of).reshape(-1)
        for pair in np.flatnonzero(slots < 24):
            assert slots[pair] // 6 == destination.reshape(-1)[pair]
            assert window.pair_of[slots[pair]] == pair and window.token_of[slots[pair]] == pair // 3
            seen[pair] += 1
        assert int(window.taken.sum()) == int((slots < 24).sum())
    np.testing.assert_array_equal(seen, (destination.reshape(-1) < 4).astype(int))


@pytest.mark.parametrize(
    "platform, ways, name",
    [("tpu", 32, "all_gather"), ("hopper", 8, "all_gather"), ("gpu", 64, "all_to_all"), ("cpu", 2, "all_gather")],
)
def test_the_platform_chooses(platform, ways, name):
    assert transport.implementation(platform, ways, 8) == name


def test_buffers_do_not_grow_with_the_devices_that_share_the_experts():
    """Kimi K2, 4096 tokens a device: rows of an all-to-all buffer, and of a gather's, are N * K and a quarter more."""
    for ways in (8, 32, 128):
        assert ways * rounds.room(4096 * 8 / ways, 4096 * 8) <= 1.3 * 4096 * 8
    assert rounds.room(4096 * 8, 32 * 4096 * 8) <= 1.3 * 4096 * 8
    assert rounds.room(6 / 8, 6) == 6, "fewer pairs than devices still need a place"
