"""From images to stores: what is missing is computed by actors and committed as it comes.

    plan         what stores and stages will take: bytes, images, FLOPs
    sizes        bytes of a store before there is one
    rates        what is assumed of machines and prices, with its source
    outlook      a plan on a machine: hours, money, bottlenecks, break-even
    planning     a plan as it is asked for, and a build's room
    calibrate    rates as this machine has them
    beforehand   what can be refused before a teacher runs: sources, labels, networks, GPUs
    precompute   the four steps of a build, each of which looks at what is there
    indexing     images of a source become samples of a dataset
    listing      what indexing has found, until all of it is, and then in order
    measure      moments of a teacher's tokens on a fixed sample, before its first shard
    quality      what a lossy codec costs that teacher, before its store is made
    extractor    the actor: turns shards of images into shard files
    loaded       its teachers; several outputs of one network are one forward

Nothing here but plans knows of students, stages or losses.

Imports features, images, recipe and machines; imported by evaluation, stages and flows.
It and training do not import each other: they meet in the stores alone.
"""
