"""The version, alone so that building reads it without importing JAX."""

__version__ = "0.2.0"
