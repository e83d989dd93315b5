#!/usr/bin/env python3
"""Loads a checkpoint in a fresh process: seconds, GB/s, and how much memory it takes beside the parameters.

Without --checkpoint it writes a made-up one of about 4 GB, as wide as DeepSeek-V4-Flash, and removes it
afterwards. On a CPU the parameters lie in host memory too, so the peak is held against their bytes: the exit
code is 1 if loading took more than 1 GiB beside them.

  python scripts/bench/load.py
  python scripts/bench/load.py --checkpoint /models/DeepSeek-V4-Flash --mtp
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALLOWED_BESIDE = 2**30  # bytes of host memory beside the parameters


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="folder in the official format")
    parser.add_argument("--mtp", action="store_true", help="load the MTP head too")
    parser.add_argument("--cached", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--step", choices=["write", "load"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "write":
        write(arguments.checkpoint)
        return 0
    if arguments.step == "load":
        print(json.dumps(load(arguments.checkpoint, mtp=arguments.mtp)))
        return 0

    with tempfile.TemporaryDirectory(prefix="dsv4-load-") as temporary:
        folder = arguments.checkpoint
        if folder is None:
            folder = Path(temporary) / "checkpoint"
            begin = time.perf_counter()
            step("write", folder)
            print(f"written in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        if not arguments.cached:
            drop_from_page_cache(folder)
        result = json.loads(step("load", folder, *(["--mtp"] if arguments.mtp else [])))
    beside = result["peak_rss_bytes"] - result["parameter_bytes"]
    result |= {
        "cached": arguments.cached,
        "gb_per_second": result["parameter_bytes"] / 1e9 / result["seconds"],
    }
    print(json.dumps(result))
    print(
        f"{result['parameter_bytes'] / 1e9:.2f} GB of parameters in {result['seconds']:.1f} s,"
        f" {result['gb_per_second']:.2f} GB/s; peak {result['peak_rss_bytes'] / 2**30:.2f} GiB,"
        f" {beside / 2**30:.2f} GiB beside them (at most {ALLOWED_BESIDE / 2**30:.0f})"
    )
    return int(beside > ALLOWED_BESIDE)


def step(name: str, folder: Path, *options: str) -> str:
    """Runs a step in a process of its own; this one stays small, since a child's peak begins with ours."""
    command = [sys.executable, __file__, "--step", name, "--checkpoint", str(folder), *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(folder: Path) -> None:
    """Four layers of Flash, all kinds of attention and of routing, with an eighth of its experts."""
    import dataclasses

    from dsv4_jax.checkpoint.synthetic import write_checkpoint
    from dsv4_jax.config import FLASH

    config = dataclasses.replace(
        FLASH, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=2, n_routed_experts=32
    )
    write_checkpoint(folder, config, shards=5, progress=sys.stderr.isatty())


def load(folder: Path, *, mtp: bool) -> dict[str, float | int | str]:
    """Loads and measures; imports late, so that the first peak is that of a bare interpreter."""
    bare = peak_rss()
    import jax

    from dsv4_jax.checkpoint.load import load

    jax.devices()  # the backend comes up before the clock starts
    imported = peak_rss()
    begin = time.perf_counter()
    model = load(folder, mtp=mtp, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - begin
    leaves = jax.tree.leaves((model.params, model.mtp_params))
    return {
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        "seconds": seconds,
        "bare_rss_bytes": bare,
        "imported_rss_bytes": imported,
        "peak_rss_bytes": peak_rss(),
        "device": jax.devices()[0].device_kind,
    }


def peak_rss() -> int:
    """The most memory that this process has held, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drop_from_page_cache(folder: Path) -> None:
    """Makes the next read come from the disk."""
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
