"""Rows that may not be cut: nothing lost, nothing over the edge, as little empty as the lengths allow."""

import itertools

import numpy as np
import pytest

from data.packing import best_fit, completed, least_padding, pack, padding

RNG = np.random.default_rng(0)
LENGTHS = {
    "every size": np.clip(np.exp(RNG.normal(6.0, 1.1, 3000)).astype(int), 1, 4096),
    "conversations": np.clip(np.exp(RNG.normal(6.9, 0.28, 3000)).astype(int), 400, 2700),
    "few lengths": 273 + 97 * RNG.integers(0, 8, 500),
    "full rows": np.full(5, 4096),
    "one": np.array([7]),
}


@pytest.mark.parametrize("way", [best_fit, completed, pack])
@pytest.mark.parametrize("kind", LENGTHS)
def test_everything_stands_in_one_row(way, kind):
    counts = LENGTHS[kind]
    rows = way(counts, 4096)
    assert sorted(itertools.chain(*rows)) == list(range(len(counts)))
    assert all(0 < counts[row].sum() <= 4096 for row in rows)
    assert rows == way(counts.copy(), 4096)
    assert least_padding(counts, 4096) <= padding(rows, counts, 4096) + 1e-12


def test_conversations_fill_their_rows():
    """Lengths like GSM8K's conversations, about four to a row: best-fit alone leaves several percent."""
    counts = LENGTHS["conversations"]
    assert padding(best_fit(counts, 4096), counts, 4096) > 0.02
    assert padding(pack(counts, 4096), counts, 4096) < 0.006  # the last few rows of 800 are what is left
    full = [4096 - counts[row].sum() for row in pack(counts, 4096)]
    assert np.median(full) == 0


def test_text_keeps_best_fit():
    counts = LENGTHS["every size"]
    assert pack(counts, 4096) == best_fit(counts, 4096)


def test_a_limit_of_rows_leaves_out_the_rest():
    counts = LENGTHS["few lengths"]
    for way in (best_fit, completed, pack):
        rows = way(counts, 4096, 20)
        used = list(itertools.chain(*rows))
        assert len(rows) == 20 and len(set(used)) == len(used) and padding(rows, counts, 4096) < 0.02


@pytest.mark.parametrize("counts, capacity", [([6, 6, 6], 10), ([7, 3, 5, 5], 10), ([9, 9, 2, 2, 2], 10), ([5, 4, 4, 4], 12)])
def test_the_bound_is_reached_where_it_must_be(counts, capacity):
    """Against the best of all orders of first-fit, which holds an optimal packing of so few."""

    def first_fit(order):
        rows = []
        for count in order:
            row = next((row for row in rows if sum(row) + count <= capacity), None)
            rows.append([count]) if row is None else row.append(count)
        return len(rows)

    fewest = min(map(first_fit, itertools.permutations(counts)))
    best = 1 - sum(counts) / (fewest * capacity)
    assert least_padding(np.array(counts), capacity) == pytest.approx(best)
    assert padding(pack(np.array(counts), capacity), np.array(counts), capacity) == pytest.approx(best)
