"""Stores into a student: draws, batches, the one training loop, its workers."""
