"""Teacher tokens: where they come from, and decoding them on the device."""
