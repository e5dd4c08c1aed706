"""What a feature source is: normalised teacher tokens for (samples, views) (law 8)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from eupe.normalise import Normaliser

Resolutions = Mapping[str, int]
"""teacher -> resolution of its input, pixels."""


class Normalisers(NamedTuple):
    """What is done to one teacher's tokens before the loss (EUPE, arXiv:2603.22387, Fig. 3)."""

    summary: Normaliser
    patches: Normaliser


class Targets(NamedTuple):
    """Normalised tokens of one teacher for a batch.

    Attributes:
        summary: float32 [B, D].
        patches: float32 [B, H, W, D2].
        valid: bool [B]; rows that are not hold zeros.
    """

    summary: Tensor
    patches: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Fetched(ABC):
    """What a source brought to the host for a batch.

    Attributes:
        valid: bool [B], rows that every teacher has.
        view_digests: of each row's canvas when it was cached; None where nothing was cached.
    """

    valid: np.ndarray
    view_digests: Sequence[str | None] | None

    @abstractmethod
    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Do the device's part: return teacher -> normalised tokens, on the device."""


class FeatureSource(ABC):
    """Gives normalised teacher tokens for samples of one dataset.

    `fetch` does what the host does (read, copy, resize) and may be called from any thread; what it
    returns does what the device does. Sources share everything after the tokens are float32.

    Attributes:
        samples: the dataset's sample table: what a row of `fetch` is.
    """

    samples: Samples

    @abstractmethod
    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""

    @abstractmethod
    def shards(self) -> ShardRanges:
        """Return the shards whose rows can be fetched."""

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        return {}

    def num_missing(
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> int:
        """Count the shards that a fetch of rows wants and that are not there yet.

        Args:
            rows: int64 [n].
            view_numbers: int64 [n].
            resolutions: as they will be fetched.
        """
        return 0

    def for_rows(self, num_rows: int) -> "FeatureSource":
        """Return a source of the same for who will fetch so many rows: by range, if few."""
        return self

    @property
    def mirrored(self) -> bool:
        """True if a store lies in a bucket: it then pays to say what will be fetched."""
        return False

    def will_need(  # noqa: B027 (where nothing is mirrored there is nothing to start)
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> None:
        """Start mirroring the shards of rows that will be fetched soon; returns at once.

        Args:
            rows: int64 [n].
            view_numbers: int64 [n].
            resolutions: as they will be fetched.
        """

    @abstractmethod
    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> Fetched:
        """Bring what is needed to the host.

        Args:
            rows: int64 [B], of `samples`.
            view_numbers: int64 [B].
            resolutions: the teachers wanted, each with its resolution.
            canvases: uint8 [B, C, C, 3], the views' pixels where the caller has drawn them; the
                caller then says which of them are valid.
        """

    def targets(
        self,
        sample_ids: Sequence[str],
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        device: str | torch.device = "cpu",
    ) -> dict[str, Targets]:
        """Find samples by their ids, fetch and decode.

        Finding them keeps 16 bytes a sample of the dataset in memory; `fetch` does not.

        Raises:
            MissingSamples: naming ids that are not in the dataset.
        """
        rows = self.samples.rows_of(sample_ids)
        return self.fetch(rows, view_numbers, resolutions).decode(device)


def normalised(tokens: Tensor, normaliser: Normaliser) -> Tensor:
    """Normalise tokens [..., D] where they lie, float32."""
    with torch.no_grad():
        done: Tensor = normaliser.to(tokens.device)(tokens)
    return done


def masked(summary: Tensor, patches: Tensor, valid: np.ndarray) -> Targets:
    """Make targets of normalised tokens; rows that are not valid become zeros, as NaN * 0 = NaN.

    Args:
        summary: float32 [B, D].
        patches: float32 [B, H, W, D2].
        valid: bool [B], on the host.
    """
    keep = torch.from_numpy(valid).to(summary.device, non_blocking=True)
    if not valid.all():
        summary = torch.where(keep[:, None], summary, 0)
        patches = torch.where(keep[:, None, None, None], patches, 0)
    return Targets(summary, patches, keep)


def check_normalisers(teachers: set[str], normalisers: Mapping[str, Normalisers]) -> None:
    """Refuse teachers without normalisers.

    Raises:
        ValueError: naming them.
    """
    missing = teachers - set(normalisers)
    if missing:
        raise ValueError(f"no normalisers of teacher {', '.join(sorted(missing))}")
