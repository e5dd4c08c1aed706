"""`stage3`: the student at several resolutions (EUPE, arXiv:2603.22387, Stage 3)."""

import sys

from pipelines import stage_command
from pipelines.recipe import recipes


def main() -> None:
    """Train it and exit: 0 done, 2 bad input."""
    sys.exit(stage_command.run("stage3", recipes.DEFAULT))


if __name__ == "__main__":
    main()
