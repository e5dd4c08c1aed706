"""Probes and schedule: kNN in both protocols with its ties, PCA colours, the rate."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from eupe import probes
from eupe.schedules import warmup_cosine
from examples import raw_pixels

ROOT = Path(__file__).parents[1]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_knn(bank, labels, queries, k):
    """Majority of the k nearest by L2, one query at a time, ties as documented."""
    answers = []
    for query in queries.double().numpy():
        distance = ((bank.double().numpy() - query) ** 2).sum(1)
        voters = labels.numpy()[np.lexsort((np.arange(len(bank)), distance))[:k]].tolist()
        most = max(map(voters.count, voters))
        answers.append(min(label for label in voters if voters.count(label) == most))
    return torch.tensor(answers)


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_knn_is_the_plain_algorithm(k, seed):
    bank, queries = normal(12, 3, seed=seed), normal(9, 3, seed=seed + 1)
    labels = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(seed))
    found = probes.knn_predict(bank, labels, queries, k)
    assert torch.equal(found, reference_knn(bank, labels, queries, k))


def test_knn_ties():
    bank = torch.tensor([[1.0], [-1.0], [1.0], [3.0]])
    labels = torch.tensor([5, 2, 2, 5])
    query = torch.zeros(1, 1)
    assert probes.knn_predict(bank, labels, query, 1).item() == 5  # equal distance: earlier row
    assert probes.knn_predict(bank, labels, query, 3).item() == 2  # majority
    assert probes.knn_predict(bank, labels, query, 4).item() == 2  # equal votes: smallest


@pytest.mark.parametrize("k", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_both_protocols_give_scikit_learns_answers_to_the_last(k):
    """On real features, raw pixels of every emoji, equal votes and equal pictures among them."""
    table = pq.read_table(ROOT / "examples/emoji/emoji.parquet").to_pylist()
    classes = sorted({row["category"] for row in table})
    vectors = torch.from_numpy(
        np.stack([raw_pixels.pixels(row["image"]["bytes"]) for row in table])
    )
    labels = torch.tensor([classes.index(row["category"]) for row in table])
    held_out = torch.tensor([row["split"] == "test" for row in table])
    bank, known, queries = vectors[~held_out], labels[~held_out], vectors[held_out]
    ours = probes.knn_predict(bank, known, queries, k)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(bank.double(), known)
    np.testing.assert_array_equal(ours, theirs.predict(queries.double()))
    ours = probes.knn_cosine(probes.cosine_neighbours(bank, queries, 20), known, k)
    theirs = KNeighborsClassifier(
        k,
        metric="cosine",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
        algorithm="brute",
    ).fit(bank.double(), known)
    np.testing.assert_array_equal(ours, theirs.predict(queries.double()))


def test_near_voters_outweigh_many_by_cosine():
    bank = torch.tensor([[1.0, 0.05], [5.0, 4.0], [3.0, 3.0]])  # lengths have no say
    labels = torch.tensor([1, 0, 0])
    found = probes.cosine_neighbours(bank, torch.tensor([[2.0, 0.0]]), 3)
    assert probes.knn_cosine(found, labels, 3).item() == 1
    assert probes.knn_predict(F.normalize(bank), labels, torch.tensor([[1.0, 0.0]]), 3).item() == 0


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(0, 1000))
def test_knn_where_many_distances_are_equal(k, seed):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (torch.randint(0, 3, (n, 2), generator=generator).float() for n in (24, 9))
    labels = torch.randint(0, 4, (24,), generator=generator)
    assert torch.equal(
        probes.knn_predict(bank, labels, queries, k), reference_knn(bank, labels, queries, k)
    )


def test_knn_of_vectors_far_from_the_origin():
    """In float32 the expanded square loses these distances altogether."""
    bank = torch.tensor([[1000.0, 0.0], [1000.0, 0.1]])
    labels = torch.tensor([0, 1])
    queries = torch.tensor([[1000.0, 0.04], [1000.0, 0.06]])
    assert probes.knn_predict(bank, labels, queries, 1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("bank", "labels", "k", "reason"),
    [
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 4, "k = 4"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 0, "k = 0"),
        (torch.zeros(3, 2), -torch.ones(3, dtype=torch.int64), 1, "labels"),
        (torch.full((3, 2), math.nan), torch.zeros(3, dtype=torch.int64), 1, "not finite"),
    ],
)
def test_knn_refuses(bank, labels, k, reason):
    with pytest.raises(ValueError, match=reason):
        probes.knn_predict(bank, labels, torch.zeros(1, 2), k)


def test_top1():
    assert probes.top1(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 4])) == 0.75


def test_pca_colours_are_the_first_components():
    """Three planted directions of falling variance become red, green and blue."""
    strengths = normal(2 * 64, 3) * torch.tensor([9.0, 4.0, 2.0])
    axes = torch.linalg.qr(normal(10, 3, seed=1)).Q
    tokens = strengths @ axes.T + 0.01 * normal(2 * 64, 10, seed=2)
    maps = [tokens[:64].view(8, 8, 10), tokens[64:].view(4, 16, 10)]
    shown = probes.pca_rgb(maps)
    assert [tuple(colours.shape) for colours in shown] == [(8, 8, 3), (4, 16, 3)]
    flat = torch.cat([colours.flatten(0, 1) for colours in shown])
    assert 0 <= flat.min() < flat.max() <= 1
    for channel in range(3):
        correlation = np.corrcoef(flat[:, channel], strengths[:, channel])[0, 1]
        assert abs(correlation) > 0.95


def test_pca_colours_do_not_flip_with_the_order_of_coordinates():
    maps = [normal(6, 6, 8) * torch.arange(1.0, 9.0)]
    reversed_maps = [patches.flip(-1) for patches in maps]
    torch.testing.assert_close(
        probes.pca_rgb(maps)[0], probes.pca_rgb(reversed_maps)[0], rtol=1e-5, atol=1e-6
    )


def test_schedule_by_hand():
    rate = [warmup_cosine(step, steps=8, warmup_steps=4) for step in range(8)]
    cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rate == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])
    assert warmup_cosine(0, steps=1) == 1.0


@pytest.mark.parametrize(("step", "steps", "warmup"), [(8, 8, 0), (-1, 8, 0), (0, 8, 9)])
def test_schedule_refuses_steps_outside_the_run(step, steps, warmup):
    with pytest.raises(ValueError, match="wants 0 to"):
        warmup_cosine(step, steps=steps, warmup_steps=warmup)
