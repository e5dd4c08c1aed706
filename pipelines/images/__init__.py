"""Pictures in: what lies in a source, and each picture's bytes again when they are wanted.

    index     lists a source's samples, each with its digest, size and labels
    walks     over folders and WebDataset tars; what every walk has in common
    parquet   the walk over Parquet files, and the row groups a reader keeps
    reader    reads an indexed sample again and draws views of it

A form of image source is a walk here and a kind in `pipelines.recipe.config.SourceConfig`.
Images, views and digests are all it knows: no teacher, no store, no stage.

Imports recipe and machines; imported by features, caching, training and the wings above them.
"""
