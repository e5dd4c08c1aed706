"""From stores to a student: batches of what is drawn, the one loop, its workers.

    batches       pixels joined with teacher tokens by (sample, view), made ahead of need
    arrivals      waiting for shards that a builder has yet to commit
    inputs        what a stage trains on, opened from a recipe's caches
    start         how a stage begins: model, optimizer, identity
    loop          the training loop
    compiled      torch.compile where it pays
    meters        means between two logs, and the pace of the data
    workers       what the loop needs of the processes that train together
    distributed   those of a torch process group
    outputs       where a stage's output lies: at the address of what made it
    job           a worker's share of a stage
    ray_train     the workers of Ray Train, and others that follow those that die
    launch        a stage in this process or by several workers

Imports features, images, recipe, machines and records; imported by evaluation, stages and flows.
It and caching do not import each other: they meet in the stores alone.
"""
