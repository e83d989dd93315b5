"""What a run was made with: machine, versions, model."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.config import Config

_PACKAGES = (
    "dsv4-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "deepseek-recipe",
    "triton",
)


def versions() -> dict[str, str]:
    """Of the packages that results depend on; those that are not installed are left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(checkpoint: str | Path, config: Config) -> dict[str, Any]:
    """For a report: nothing in it changes a score."""
    devices = jax.devices()
    known = versions()
    return {
        "checkpoint": str(checkpoint),
        "config": hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16],
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "dsv4_jax": known.pop("dsv4-jax", "not installed"),
        "versions": known,
        "finished": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
