"""Digests of weights that a process of its own takes from a folder of downloads, offline."""

import os
import subprocess
import sys
from pathlib import Path

from eupe.spec import EncoderSpec
from eupe.weights import digest

PATIENCE_SECONDS = 300


def digests(downloads: Path, spec: EncoderSpec, uris: list[str]) -> list[str]:
    """Return the digest of each URI's weights, or the sentence that refuses them.

    Args:
        downloads: laid out as huggingface_hub lays them out; it reads the place at import.
        spec: the encoder that is to take them.
        uris: as in eupe.weights.
    """
    run = subprocess.run(
        [sys.executable, __file__, spec.model_dump_json(), *uris],
        env={**os.environ, "HF_HUB_CACHE": str(downloads), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    return run.stdout.splitlines()


if __name__ == "__main__":
    encoder = EncoderSpec.model_validate_json(sys.argv[1])
    for uri in sys.argv[2:]:
        try:
            print(digest(uri, encoder))
        except ValueError as error:
            print(error)
