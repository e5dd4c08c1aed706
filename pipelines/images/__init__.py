"""Pictures in: what lies in a source, and each picture's bytes again when they are wanted.

    index     lists a source's samples, each with its digest, size and labels
    looker    looks at some pieces of a source: digests, headers, labels
    folders   the walk over folders, and the files that the other two lie in
    tars      the walk over WebDataset tars
    parquet   the walk over Parquet files, and the row groups a reader keeps
    columns   of Parquet files: their types, names of classes, labels
    walks     what every walk has in common: pieces, candidates, ids
    aside     what a walk leaves aside, said once; with classes, that may be none
    warned    warnings of libraries, with the picture's name
    reader    reads an indexed sample again and draws views of it

A form of image source is a walk here and a kind in `pipelines.recipe.config.SourceConfig`.
Images, views and digests are all it knows: no teacher, no store, no stage.

Imports recipe and machines; imported by features, caching, training and the wings above them.
"""
