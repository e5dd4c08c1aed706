"""`stage2`: a student at a fixed resolution (EUPE, arXiv:2603.22387, Stage 2)."""

import sys

from pipelines import stage_command
from pipelines.recipe import recipes


def main() -> None:
    """Train it and exit: 0 done, 2 bad input."""
    sys.exit(stage_command.run("stage2", recipes.STAGE_2_ONLY))


if __name__ == "__main__":
    main()
