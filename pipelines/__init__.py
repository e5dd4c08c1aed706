"""The work: image sources, extraction actors, training and evaluation."""
