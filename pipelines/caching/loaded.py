"""The teachers of a process: each is loaded when first needed, and one network computes for all.

Teachers that name the same weights, architecture, pixels and dtype differ in what they read: the
summary, or the layer. One forward of their network serves them, if it gives each of them what its
own would, to the last bit: a store's bytes may not depend on which others a recipe has (law 1).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from eupe.encoders import Features
from eupe.teachers import Arrive, Teacher, features_together, load_teacher
from pipelines.machines import once
from pipelines.recipe.config import TeacherConfig
from pipelines.recipe.stores import network
from pipelines.records import checkpoint


class Loaded:
    """Teachers by name, loaded one by one.

    Args:
        teachers: those that may be asked for.
        device: they compute on.
    """

    def __init__(self, teachers: Iterable[TeacherConfig], device: str) -> None:
        self._configs = {teacher.name: teacher for teacher in teachers}
        self._device = device
        self._teachers: dict[str, Teacher] = {}
        self._agree: dict[tuple[tuple[str, ...], int], bool] = {}

    def teacher(self, name: str) -> Teacher:
        """Return a teacher; of a network that is loaded already, with that one.

        Raises:
            BadInput: its weights cannot be loaded.
        """
        if name not in self._teachers:
            config = self._configs[name]
            checkpoint.bring(config.weights)
            loaded = load_teacher(name, config.encoder, config.weights, config.dtype, self._device)
            for other, there in self._teachers.items():
                # The one with more tensors, such as a pooling head, serves both.
                if network(self._configs[other]) == network(config) and not loaded.share(there):
                    there.share(loaded)
            self._teachers[name] = loaded
        return self._teachers[name]

    def features(
        self,
        names: Sequence[str],
        pixels: np.ndarray,
        compute_batch: int,
        arrive: Arrive | None = None,
    ) -> dict[str, Features]:
        """Return name -> what that teacher makes of pictures, each network run once.

        Args:
            names: of the teachers.
            pixels: uint8 [n, R, R, 3], on the host.
            compute_batch: pictures a forward pass, padded.
            arrive: brings a batch to the device, as of `Teacher.features`.

        Raises:
            BadInput: as of `teacher`.
        """
        groups: dict[int, list[Teacher]] = {}
        for teacher in [self.teacher(name) for name in dict.fromkeys(names)]:
            groups.setdefault(id(teacher.encoder.network), []).append(teacher)
        return {
            teacher.spec.name: features
            for group in groups.values()
            for teacher, features in zip(
                group, self._of_network(group, pixels, compute_batch, arrive), strict=True
            )
        }

    def _of_network(
        self,
        teachers: Sequence[Teacher],
        pixels: np.ndarray,
        compute_batch: int,
        arrive: Arrive | None,
    ) -> list[Features]:
        """Return what each of some teachers of one network makes of pictures.

        The first batch of such teachers at a resolution goes through each of them too.
        """
        key = tuple(teacher.spec.name for teacher in teachers), pixels.shape[1]
        alone = len(teachers) == 1 or not self._agree.get(key, True)
        together = [] if alone else features_together(teachers, pixels, compute_batch, arrive)
        if not alone and key in self._agree:
            return together
        apart = [teacher.features(pixels, compute_batch, arrive) for teacher in teachers]
        if not alone:
            self._agree[key] = all(map(_equal, together, apart))
            if not self._agree[key]:
                once.say(
                    f"{', '.join(key[0])}: one forward gives other bits than a forward each, so "
                    "each has its own"
                )
        return apart


def _equal(ours: Features, theirs: Features) -> bool:
    """True if two teachers' features are the same bits, NaN included."""
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(ours, theirs, strict=True)
    )
