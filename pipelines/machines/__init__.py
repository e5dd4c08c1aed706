"""What the work runs on, whatever the work is.

    cluster    connecting to Ray: the cluster RAY_ADDRESS names, or one of our own
    pool       restartable actors with a few calls in flight each
    in_process the same calls without Ray
    deaths     of actors and workers: those that a lost node explains are not counted
    every_node asking all nodes of the cluster the same
    shared_folders  which folders another machine sees
    lease      one process at a time works on something, and a dead one holds nothing
    progress   how far a long step is, shown here or told to another process
    once       what a process says once
    errors     bad input is one sentence at the edge, a bug keeps its traceback
    interrupt  Ctrl-C ends it at once, SIGTERM in order where work asks for that
    job_folder where a process tells the one that waits for it, and is told to end

Nothing here knows of images, stores, recipes or models: a file that needs one of them belongs
higher up.

Imports records alone, if anything; imported by every wing above it and by flows.
"""
