"""Build again, as a user who may read a cache root and write nothing of it: ROOT IMAGES HOW HOME.

HOW is "plain", or "flow": inside a Prefect flow, each step a task, as both flows do it.
"""

import os
import sys
from pathlib import Path

from pipelines.caching import precompute
from pipelines.machines.errors import one_sentence
from pipelines.recipe.config import SourceConfig
from support.small_caches import job

if __name__ == "__main__":
    root, images, how, home = sys.argv[1:]
    os.environ |= {"HOME": home, "PREFECT_HOME": home, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    work = job(Path(root), SourceConfig(kind="folder", path=images))
    if how == "flow":
        import prefect

        from flows import teacher_cache
    with one_sentence():
        if how == "plain":
            built = precompute.build([[work]])
        else:
            built = prefect.flow(name="reads-only")(teacher_cache.build)([[work]], "Stores")
    print(built)
