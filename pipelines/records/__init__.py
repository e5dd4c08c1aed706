"""What a run leaves behind: checkpoints, whole states, metrics."""
