"""A label of samples: what kNN predicts, and what makes it impossible."""

import json
from collections.abc import Sequence

import polars as pl

from eupe.errors import BadInput


def labels_of(samples: pl.DataFrame, label: str) -> list[str]:
    """Return a label of samples (columns sample_id and labels, JSON objects).

    Raises:
        BadInput: a sample has none.
    """
    found = [json.loads(text).get(label) for text in samples["labels"].to_list()]
    if None in found:
        first = found.index(None)
        example = json.loads(samples["labels"][first])
        raise BadInput(
            f"evaluation.label = {label!r}: sample {samples['sample_id'][first]!r} has none; its "
            f"labels are {', '.join(sorted(example)) or 'none at all'}; evaluation.label=null "
            "leaves kNN out"
        )
    return found


def check_in_common(bank: Sequence[str], queries: Sequence[str]) -> None:
    """Refuse labels of two alphabets: not one of the bank's is among the queries'.

    Raises:
        BadInput: naming some of both.
    """
    if {*bank} & {*queries}:
        return
    first = [", ".join(repr(label) for label in sorted({*each})[:3]) for each in (bank, queries)]
    raise BadInput(
        f"kNN can predict nothing: the bank's labels ({first[0]}, ...) and the held-out set's "
        f"({first[1]}, ...) have not one in common; give both one kind of label, name another "
        "with evaluation.label, or leave kNN out with evaluation.label=null"
    )
