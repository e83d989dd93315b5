"""The `dsv4-jax` command: a file for each command, `main` for what they share."""

from dsv4_jax.cli.main import main

__all__ = ["main"]
