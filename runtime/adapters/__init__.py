"""Low-rank adapters while a model serves: read from folders, kept within bytes, added by row."""
