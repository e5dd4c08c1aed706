"""YAML files that say what is asked for: recipes and sweeps."""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eupe.errors import BadInput


def read(path: Path, kind: str) -> object:
    """Return what a file says as plain data, its references resolved.

    Args:
        path: of the file.
        kind: what it should hold, for the message: a recipe, a sweep.

    Raises:
        BadInput: no such file, or no YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise BadInput(f"{path}: no {kind} there ({error.strerror})") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
