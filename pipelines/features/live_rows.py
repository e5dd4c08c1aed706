"""Rows that a store lacks, computed as a build computes them and encoded as it would store them."""

import threading
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from cache.codec.encoded import Escapes
from cache.store import Store
from eupe import views
from eupe.errors import BadInput
from eupe.spec import AugmentedView, CentreView, TeacherSpec
from eupe.teachers import Teacher, load_teacher
from pipelines.features.codec_torch import encode
from pipelines.images.reader import ImageReader
from pipelines.recipe.config import TeacherConfig

_loaded: WeakValueDictionary[tuple[str, str], Teacher] = WeakValueDictionary()
"""(teacher as a recipe has it, device) -> it, for as long as a data set's rows want it."""
_computing = threading.Lock()
"""Held by the one thread of the process whose teacher is loaded or computes."""


class Rows(NamedTuple):
    """Rows as a store has them, n of them.

    Attributes:
        summaries: float32 [n, D].
        patches: encoded, [n, *row_shape] in storage dtype.
        escapes: of those patches.
        valid: bool [n].
    """

    summaries: np.ndarray
    patches: np.ndarray
    escapes: Escapes
    valid: np.ndarray


class LiveRows:
    """The teachers of one data set's stores, in the loop for what those lack.

    Args:
        teachers: that may be asked for, each loaded when it first is.
        images: reads the samples' bytes.
        policy: of the views.
        device: the teachers compute on.
    """

    def __init__(
        self,
        teachers: Iterable[TeacherConfig],
        images: ImageReader,
        policy: CentreView | AugmentedView,
        device: str = "cpu",
    ) -> None:
        self._configs = {config.name: config for config in teachers}
        self._images, self._policy, self._device = images, policy, device
        self._teachers: dict[str, Teacher] = {}

    def load(self, store: Store) -> Teacher:
        """Return the teacher of a store.

        Raises:
            BadInput: its weights cannot be loaded, or are not those that the store was made with.
        """
        name = store.spec.teacher.name
        with _computing:
            if name not in self._teachers:
                config = self._configs[name]
                key = config.model_dump_json(), self._device
                teacher = _loaded.get(key)
                if teacher is None:
                    teacher = _loaded[key] = load_teacher(
                        name, config.encoder, config.weights, config.dtype, self._device
                    )
                check_teacher(teacher.spec, store)
                self._teachers[name] = teacher
        return self._teachers[name]

    def compute(
        self,
        store: Store,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        canvases: np.ndarray | None = None,
    ) -> Rows:
        """Compute rows of a store, in its compute batch.

        Args:
            store: whose teacher, resolution and codec.
            rows: int64 [n], n at least 1.
            view_numbers: int64 [n].
            canvases: uint8 [n, C, C, 3], where the caller has drawn them, and knows which of them
                are valid; None: they are drawn here.

        Raises:
            BadInput: as of `load`, or images that are out of reach.
        """
        valid = np.ones(len(rows), bool)
        if canvases is None:
            samples = store.samples.take(rows)
            canvases, digests = self._images.canvases(samples, self._policy, view_numbers)
            valid = np.array([digest is not None for digest in digests])
        pixels = np.stack([views.resize(canvas, store.spec.resolution) for canvas in canvases])
        teacher = self.load(store)
        with _computing:
            features = teacher.features(pixels, int(str(store.provenance["compute_batch"])))
            encoded = encode(store.codec, features.patches.flatten(1, 2))
            summaries = features.summary.cpu().numpy()
        valid &= encoded.valid & np.isfinite(summaries).all(1)
        return Rows(summaries, encoded.data, encoded.escapes, valid)


def check_teacher(loaded: TeacherSpec, store: Store) -> None:
    """Refuse a teacher that is not the one a store was made with.

    Raises:
        BadInput: naming both digests.
    """
    if loaded != store.spec.teacher:
        raise BadInput(
            f"teacher {loaded.name!r} has weights {loaded.weights[:12]} here, "
            f"{store.directory} was made with {store.spec.teacher.weights[:12]}: every machine "
            "wants the same weights file"
        )
