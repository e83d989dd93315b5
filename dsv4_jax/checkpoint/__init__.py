"""Checkpoints in the official format: names, loading, and writing made-up ones."""
