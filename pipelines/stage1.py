"""`stage1`: several teachers into one large proxy (EUPE, arXiv:2603.22387, Stage 1)."""

import sys

from pipelines import stage_command
from pipelines.recipe import recipes


def main() -> None:
    """Train it and exit: 0 done, 2 bad input."""
    sys.exit(stage_command.run("stage1", recipes.DEFAULT))


if __name__ == "__main__":
    main()
