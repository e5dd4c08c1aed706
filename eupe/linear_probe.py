"""The linear probe: multinomial logistic regression on frozen summaries, by scikit-learn."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from eupe.addressed import hashed

Vectors = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
REGULARISATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of scikit-learn, from strong to weak; features are standardised."""
MAX_ITERATIONS = 200
ENOUGH_WORSE = 2
"""So many in a row that are right less often than the best before: weaker ones are not tried."""
CHOSEN_ON = 5
"""One in so many training images chooses the regularisation."""


@dataclass(frozen=True)
class Fitted:
    """What a linear probe found.

    Attributes:
        predicted: labels of the queries, int64 [q].
        regularisation: C.
        converged: True if the fit ended before MAX_ITERATIONS.
    """

    predicted: Labels
    regularisation: float
    converged: bool


def linear_probe(bank: Vectors, labels: Labels, queries: Vectors) -> Fitted:
    """Label queries by logistic regression on the bank's standardised vectors.

    Mean and deviation are the bank's. C is the strongest of those that are right most often on a
    fifth of the bank, fitted on the rest, of the `REGULARISATIONS` up to ENOUGH_WORSE in a row that
    are worse; the queries have no part in it. The final fit is
    `LogisticRegression(C=C, max_iter=MAX_ITERATIONS)` on `StandardScaler` of the bank.

    It computes on one thread: several encoders are fitted side by side, and threads that wait for
    each other on busy cores take twenty times as long.

    Args:
        bank: summaries, float64 [n, D].
        labels: int64 [n].
        queries: summaries, float64 [q, D].
    """
    with threadpool_limits(1):
        return _probe(bank, labels, queries)


def _probe(bank: Vectors, labels: Labels, queries: Vectors) -> Fitted:
    scaler = StandardScaler().fit(bank)
    bank, queries = scaler.transform(bank), scaler.transform(queries)
    drawn = hashed(np.arange(len(bank)), "eupe.linear_probe/chosen on") % np.uint64(CHOSEN_ON) == 0
    chosen, _ = _most_right(bank[~drawn], labels[~drawn], bank[drawn], labels[drawn])
    if len(np.unique(labels)) == 1:  # nothing to fit
        return Fitted(np.full(len(queries), labels[0]), chosen, True)
    model = LogisticRegression(C=chosen, max_iter=MAX_ITERATIONS)
    converged = _fit(model, bank, labels)
    return Fitted(model.predict(queries), chosen, converged)


def _most_right(
    bank: Vectors, labels: Labels, others: Vectors, truth: Labels
) -> tuple[float, float]:
    """Return the C that is right most often on others, and how often, 0 to 1."""
    best = REGULARISATIONS[0], -1.0
    if len(others) == 0 or len(np.unique(labels)) == 1:
        return best
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)  # from the last one's
    worse = 0
    for regularisation in REGULARISATIONS:
        model.C = regularisation
        _fit(model, bank, labels)
        right = float((model.predict(others) == truth).mean())
        worse = worse + 1 if right < best[1] else 0
        if right > best[1]:
            best = regularisation, right
        if worse == ENOUGH_WORSE:  # the weaker, the longer it takes
            break
    return best


def _fit(model: LogisticRegression, bank: Vectors, labels: Labels) -> bool:
    """Fit a model; return True if it converged, which its caller reports."""
    model.fit(bank, labels)
    return int(model.n_iter_.max()) < MAX_ITERATIONS
