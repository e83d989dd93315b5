"""What the commands say beside their results: on stderr, so that stdout holds results alone."""

import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def complain(message: str, exit_code: int) -> int:
    """Says what went wrong, and gives the code back."""
    say(f"error: {message}")
    return exit_code


def warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """In place of `warnings.showwarning`."""
    if issubclass(category, DeprecationWarning | PendingDeprecationWarning):
        return
    say(f"warning: {message}")


def show(value: Mapping[str, Any]) -> None:
    """A result as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def peak_gib() -> float:
    """Memory at its highest: of the busiest device where it says so, else of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return (max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
