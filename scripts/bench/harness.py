"""What all benchmarks share: timing on the device, facts about it, and rows of results in a file."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def median_us(run: Callable[[], Any], repeats: int = 5, inner: int = 1) -> float:
    """Median microseconds of one call, of `inner` calls that are dispatched together, after a warm-up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(inner)])
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times) * 1e6


def timed(run: Callable[[], Any], calls: int, sustained_ms: float = 300) -> dict[str, float]:
    """Microseconds of one of the `calls` in `run`: alone, and under load that lasts.

    `us` is the median of five runs, each waited for, as other projects time replays of a CUDA graph; starting
    the program is taken off. `us_sustained` is of runs back to back for `sustained_ms`: a chip that draws all
    its power lowers its clocks within some tens of milliseconds.
    """
    jax.block_until_ready(run())
    time.sleep(0.05)
    alone = median_us(run) - median_us(lambda: _next(0))
    inner = max(1, round(sustained_ms * 1e3 / alone / 4))
    times = {"us": alone, "us_sustained": median_us(run, repeats=3, inner=inner)}
    return {name: round(us / calls, 2) for name, us in times.items()}


@jax.jit
def _next(number: jax.Array) -> jax.Array:
    """Next to nothing: what it takes is starting a program, and hearing of its end."""
    return number + 1


def facts() -> dict[str, str]:
    """Device, driver, jax, commit and date; the commit may come from $DSV4_COMMIT where there is no git."""
    device = jax.devices()[0]
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    commit = os.environ.get("DSV4_COMMIT") or _output("git", "rev-parse", "--short", "HEAD")
    return {
        "device": device.device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Adds rows to a results file; a row takes the place of one with the same id and implementation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    new = {(row["id"], row["implementation"]) for row in rows}
    kept = [row for row in old if (row["id"], row["implementation"]) not in new]
    lines = ",\n".join(json.dumps(row) for row in kept + rows)
    path.write_text(f"[\n{lines}\n]\n")


def repeated(run: Callable[..., Any], calls: int) -> Any:
    """A jitted function of a list of inputs: `calls` times `run`, one call after the other, on each in turn.

    Without a loop, which would read a number back to the host after every round; so CUDA can replay it as one
    graph. It returns what all calls returned.
    """

    def all_calls(inputs: list[Any]) -> list[Any]:
        found = []
        for number in range(calls):
            found.append(run(*inputs[number % len(inputs)]))
            # To XLA the next call hangs on this one's results: it can neither merge nor reorder them.
            inputs, found[-1] = jax.lax.optimization_barrier((inputs, found[-1]))
        return found

    return jax.jit(all_calls)
