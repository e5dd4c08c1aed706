"""The feature store: what every (sample, view) looks like to a teacher. Loads no torch.

    listing, verify    look at whole stores: what they hold, what is wrong with them
    reader, writer     give rows to whoever trains, take rows from whoever extracts
    order              the order in which an epoch walks over rows
    store              one open store: spec, codec, moments, what is still to do
    manifest, samples  which shards exist, which samples a dataset has
    sample_changes     which samples are new, and which lie elsewhere now
    runs               a manifest's records: looked up, streamed and merged part by part
    heads              which segments count, and how one commit follows another
    segments           Arrow files named by their content: what both of them grow by
    shard_records      which shards a reader has: of one version, or as its store grows on
    shard_rows         the rows of one shard, mapped or read by position
    codec/             how patches are kept       format/   what the bytes of a file mean
    files/             where files lie and how they get there: folders, buckets, the mirror
    errors             what can be wrong

An arrow runs from a line to the lines below it. Of the folders, format reads through files and
knows the escapes of codec; codec and files know nothing of each other or of format, and none of
the three knows a store.
"""
