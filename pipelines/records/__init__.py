"""What a run leaves behind, and how it is read again.

    checkpoint    weights, training state and identity of a step, whole or not there
    whole_state   the same states whether one process holds them or many
    tracking      figures as JSONL and TensorBoard events
    made_by       the version and commit of the code that wrote it

What a run's identity consists of is decided by who trains; here it is plain data that is
compared. A file written here appears whole, by `cache.files.atomic`.

The lowest wing: imports none of the others, and every one may import it.
"""
