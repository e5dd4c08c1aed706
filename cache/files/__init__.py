"""Where files lie and how they get there, whatever is in them.

    place            a root in a local folder or in a bucket: the one file that tells them apart
    mirror           local copies of a bucket's objects, filled ahead of need
    mirror_space     the room of a mirror: what it holds, what it evicts
    atomic           written, then visible: temporary name, fsync, rename; swaps of a HEAD
    copies           folders that are worked on here and lie in a bucket, file by file
    trees            folders of a bucket whose files belong together: what HEAD names
    bucket           objects of s3://, gs:// and az://: read, sent and swapped whole
    bucket_path      their names, which behave like paths
    bucket_service   connections to the services, and what they say in a sentence
    refused          what the operating system refuses to write, in one sentence
    mapped           files mapped into memory, and how many of them a process keeps

An arrow runs downwards. Nothing here knows what a file means: of the rest of `cache` only `errors`
is imported.
"""
