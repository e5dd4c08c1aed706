"""Codecs: how a row of patch tokens is stored, and what that keeps of it (numpy: the oracle)."""
