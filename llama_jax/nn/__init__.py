"""The model: pure functions from arrays to arrays."""
