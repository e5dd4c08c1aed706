"""From images to stores: what is missing is computed by actors and committed as it comes.

    beforehand   what can be refused before a teacher runs: sources, labels, networks, GPUs
    precompute   the four steps of a build, each of which looks at what is there
    indexing     images of a source become samples of a dataset
    listing      what indexing has found, until all of it is, and then in order
    measure      moments of a teacher's tokens on a fixed sample, before its first shard
    quality      what a lossy codec costs that teacher, before its store is made
    extractor    the actor: holds the teachers, turns shards of images into shard files

Nothing here knows of students, stages or losses.

Imports features, images, recipe and machines; imported by evaluation, stages and flows.
It and training do not import each other: they meet in the stores alone.
"""
