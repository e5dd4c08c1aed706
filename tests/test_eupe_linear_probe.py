"""The linear probe: scikit-learn's own answers, and a choice that never sees the queries."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from eupe import linear_probe as probes
from eupe.addressed import hashed
from eupe.linear_probe import CHOSEN_ON, MAX_ITERATIONS, REGULARISATIONS, linear_probe


def images(count: int, seed: int, width: int = 24):
    """Three classes that overlap, on features of very different scale."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(3, size=count)
    centres = np.random.default_rng(0).normal(size=(3, width))
    vectors = centres[labels] + 1.5 * drawn.normal(size=(count, width))
    return vectors * np.logspace(-3, 3, width), labels


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_predictions_are_scikit_learns(seed):
    (bank, labels), (queries, truth) = images(300, seed), images(200, seed + 10)
    found = linear_probe(bank, labels, queries)
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(C=found.regularisation, max_iter=MAX_ITERATIONS)
    model.fit(scaler.transform(bank), labels)
    np.testing.assert_array_equal(found.predicted, model.predict(scaler.transform(queries)))
    assert found.converged
    assert (found.predicted == truth).mean() > 0.6  # where chance has a third


def test_the_queries_have_no_part_in_the_choice():
    (bank, labels), (queries, _) = images(300, 1), images(40, 2)
    found = linear_probe(bank, labels, queries)
    other = linear_probe(bank, labels, queries[:7] * 3 - 1)
    assert found.regularisation == other.regularisation
    one = linear_probe(bank, labels, queries[:1])
    assert one.predicted[0] == found.predicted[0]


def test_the_choice_is_right_most_often_on_the_part_it_is_made_on():
    bank, labels = images(120, 4, width=60)
    drawn = hashed(np.arange(120), "eupe.linear_probe/chosen on") % np.uint64(CHOSEN_ON) == 0
    assert 0.1 < drawn.mean() < 0.3
    scaled = StandardScaler().fit_transform(bank)
    right = {}
    for regularisation in REGULARISATIONS:
        model = LogisticRegression(C=regularisation, max_iter=MAX_ITERATIONS)
        model.fit(scaled[~drawn], labels[~drawn])
        right[regularisation] = (model.predict(scaled[drawn]) == labels[drawn]).sum()
    chosen = linear_probe(bank, labels, bank[:3]).regularisation
    assert len({*right.values()}) > 2
    assert chosen == max(right, key=right.get)  # of equals the first, which is the strongest


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_a_fit_that_is_cut_short_says_so(monkeypatch):
    monkeypatch.setattr(probes, "MAX_ITERATIONS", 2)
    (bank, labels), (queries, _) = images(300, 1), images(5, 2)
    assert not linear_probe(bank, labels, queries).converged


def test_a_single_class_is_all_that_can_be_said():
    bank, _ = images(20, 1)
    found = linear_probe(bank, np.full(20, 3), bank[:4])
    assert found.predicted.tolist() == [3, 3, 3, 3]
