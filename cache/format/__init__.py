"""What the bytes of a cache root mean (docs/store_format.md), one file a kind of file.

    sample_table     columns of a dataset's samples
    record_table     records of committed shards, searched by view and shard
    rows_table       ids, validity, digests, summaries and escapes of a shard's rows
    moments_table    count, mean and scatter of a store's tokens
    codec_table      fitted values of a codec that has too many for JSON
    arrow_tables     Arrow IPC files: written as bytes, read without a copy
    zarr_shard       patches: zarr.json, and a shard with its index
    layout           which name each file has

Tables stand on `arrow_tables`, which opens files through `cache.files`. `rows_table` knows the
escapes of `cache.codec.encoded`. Nothing here knows a store, a manifest or a reader.
"""
