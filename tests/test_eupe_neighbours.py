"""Nearest neighbours: the shortlist changes no answer, and a query it could fail gets a longer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eupe import neighbours
from eupe.neighbours import nearest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(bank: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """Rank every bank vector by its float64 distance, ties by row."""
    squares = (queries.double()[:, None] - bank.double()[None]).square().sum(2)
    return squares.sort(dim=1, stable=True).indices[:, :k]


@settings(max_examples=40)
@given(
    st.integers(1, 90), st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.0, 1e3, 1e6])
)
def test_a_shortlist_gives_the_answers_of_float64(n, k, seed, away):
    """Vectors far from the origin too, where float32 cannot tell one distance from another."""
    bank, queries = normal(n, 7, seed=seed) + away, normal(9, 7, seed=seed + 1) + away
    k = min(k, n)
    rows, squares = nearest(bank, queries, k)
    assert torch.equal(rows, plain(bank, queries, k))
    apart = bank.double()[rows] - queries.double()[:, None]
    torch.testing.assert_close(squares, apart.square().sum(2))


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(0, 1000))
def test_equal_distances_go_to_the_earlier_row(k, seed):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (torch.randint(0, 3, (n, 2), generator=generator).float() for n in (240, 9))
    assert torch.equal(nearest(bank, queries, k)[0], plain(bank, queries, k))


def test_a_query_whose_shortlist_could_miss_a_neighbour_gets_a_longer_one(monkeypatch):
    """A thousand vectors nearer to each other than float32 can tell apart."""
    bank = normal(1000, 8)
    bank[:600] = 1 + 1e-7 * bank[:600]
    queries = torch.ones(3, 8)
    lengths = []
    ranked = neighbours.Shortlist.ranked

    def counted(shortlist, of, k, length):
        lengths.append(length)
        return ranked(shortlist, of, k, length)

    monkeypatch.setattr(neighbours.Shortlist, "ranked", counted)
    assert torch.equal(nearest(bank, queries, 5)[0], plain(bank, queries, 5))
    assert lengths == [37, 296, 1000]


def test_coarse_products_are_not_trusted():
    bank, queries = normal(300, 8), normal(20, 8, seed=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(nearest(bank, queries, 5)[0], plain(bank, queries, 5))
        certain = neighbours.Shortlist(bank).ranked(queries, 5, 37)[2]
    finally:
        torch.set_float32_matmul_precision(before)
    assert not certain.any()


@pytest.mark.parametrize(("distances", "block"), [(2**26, 2**15), (100, 2**15), (2**26, 3)])
def test_chunks_change_nothing(monkeypatch, distances, block):
    monkeypatch.setattr(neighbours, "MAX_DISTANCES", distances)
    monkeypatch.setattr(neighbours, "BLOCK", block)
    bank, queries = normal(64, 5), normal(33, 5, seed=1)
    assert torch.equal(nearest(bank, queries, 4)[0], plain(bank, queries, 4))
