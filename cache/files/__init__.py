"""Files: here or in a bucket, written whole, mirrored, mapped."""
