"""Dividing devices among groups of matrices that travel together."""

import numpy as np

from optim.packing import Load, capacity, owners, share_exchanges

# Kimi K2's matrices that mesh axes cut: q_a, kv_a, o, router, the shared experts, and the three of its dense layer.
K2 = [Load(61, 1536 * 7168), Load(61, 576 * 7168), Load(61, 8192 * 7168), Load(60, 384 * 7168), Load(180, 2048 * 7168)]
DENSE = Load(3, 18432 * 7168)


def test_k2_without_its_dense_layer_fills_128_devices():
    """61 devices take one output projection each, and all other matrices fit the rest in buffers of the same size."""
    assert capacity(K2, 128) == 8192 * 7168
    assert owners(K2, 128) == [13, 5, 61, 3, 45] and sum(owners(K2, 128)) == 127


def test_k2_is_one_exchange_as_large_as_one_dense_matrix():
    assert share_exchanges([*K2, DENSE], 128) == [[0, 1, 2, 3, 4, 5]]
    assert capacity([*K2, DENSE], 128) == DENSE.elements


def test_any_loads():
    """Every matrix has an owner, no owner holds more than the capacity, and sharing never moves more than not sharing."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        devices = int(rng.integers(2, 40))
        loads = [Load(int(rng.integers(1, 50)), int(rng.integers(1, 1000))) for _ in range(rng.integers(1, 6))]
        exchanges = share_exchanges(loads, devices)
        assert sorted(i for e in exchanges for i in e) == list(range(len(loads)))
        moved = 0
        for mine in ([loads[i] for i in e] for e in exchanges):
            counts, size = owners(mine, devices), capacity(mine, devices)
            assert min(counts) >= 1 and sum(counts) <= devices
            assert all(-(-load.count // n) * load.elements <= size for load, n in zip(mine, counts))
            moved += size
        assert moved <= sum(-(-load.count // devices) * load.elements for load in loads)


def test_more_loads_than_devices():
    assert capacity([Load(1, 5)] * 3, 2) is None
    assert sum(map(len, share_exchanges([Load(1, 5)] * 3, 2))) == 3
