"""Where the time of a program goes on the device, kernel by kernel, from JAX's own profiler."""

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_times(run: Callable[[], Any], calls: int = 1) -> dict[str, tuple[float, float]]:
    """Launches and microseconds per call of each kernel that `run`, which makes `calls` calls, starts."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "/device:GPU" in event["args"]["name"]
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["pid"] in devices
        and "Stream" in event["args"]["name"]
    }
    counts, totals = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            counts[event["name"]] += 1
            totals[event["name"]] += event["dur"]
    return {name: (counts[name] / calls, total / calls) for name, total in totals.most_common()}


def print_kernel_times(title: str, times: dict[str, tuple[float, float]], most: int = 12) -> None:
    """A line a kernel, slowest first, and their sum."""
    total = sum(us for _, us in times.values())
    launches = sum(count for count, _ in times.values())
    print(f"{title}: {total:.1f} us in {launches:.1f} launches", flush=True)
    for name, (count, us) in list(times.items())[:most]:
        print(f"  {us:9.2f} us  {count:6.2f} x  {name[:90]}", flush=True)
