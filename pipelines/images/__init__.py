"""Pictures in: where they lie, how they are listed, how they are decoded."""
