"""What `eupe` can be asked: one file a group of commands, imported without their work."""
