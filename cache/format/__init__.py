"""What lies on disk, byte by byte: names, Zarr shards, Arrow tables."""
