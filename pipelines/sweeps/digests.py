"""Digests of weights that a hub has: told again without a download, for a dry run."""

import json
from pathlib import Path

from cache.files import atomic
from cache.format import layout
from eupe.spec import EncoderSpec
from eupe.weights import digest
from pipelines.recipe.config import Recipe

FILE = "weights.json"
HUBS = ("hub", "hf-hub:")
"""How weights begin that are downloaded."""


class Digests:
    """The digests that sweeps below one root have met, kept in a file there.

    Args:
        root: folder of the outputs of stages.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        there = self._path.is_file()
        self._known: dict[str, str] = json.loads(self._path.read_bytes()) if there else {}

    def told(self, uri: str, encoder: EncoderSpec) -> str:
        """Return a digest; of a hub's weights that were never read here, where they are from."""
        if not uri.startswith(HUBS):
            return digest(uri, encoder)
        name = _name(uri, encoder)
        return self._known.get(name, f"{name}, never read here")

    def named(self, recipe: Recipe) -> Recipe:
        """Return a recipe that names a hub's weights by their digest, where that is known."""
        teachers = {
            name: teacher.model_copy(update={"weights": f"sha256:{found}"})
            if (found := self._known.get(_name(teacher.weights, teacher.encoder)))
            else teacher
            for name, teacher in recipe.teachers.items()
        }
        return recipe.model_copy(update={"teachers": teachers})

    def read(self, uri: str, encoder: EncoderSpec) -> str:
        """Return a digest, of a hub's weights after they are downloaded, and keep those.

        Raises:
            BadInput: as `digest`.
        """
        found, name = digest(uri, encoder), _name(uri, encoder)
        if uri.startswith(HUBS) and self._known.get(name) != found:
            self._known[name] = found
            text = json.dumps(self._known, indent=2).encode()
            atomic.write(self._path, [text], layout.scratch_directory(self._path.parent))
        return found


def _name(uri: str, encoder: EncoderSpec) -> str:
    return f"{uri} of {encoder.library}'s {encoder.architecture}"
