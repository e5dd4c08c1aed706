"""Images into stores: indexing, extraction actors, moments, building caches."""
