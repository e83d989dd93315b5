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
import jax.numpy as jnp

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
    """Microseconds of one of the `calls` in `run`: in short runs, and under load that lasts.

    `us` is what three runs more add to one, in the median of seven tries with pauses between: as others time
    replays of a CUDA graph by events on the device, without what starting a program costs. `us_sustained` is
    of runs back to back for `sustained_ms`: a chip that draws all its power lowers its clocks.
    """
    jax.block_until_ready(run())
    added = []
    for _ in range(7):
        time.sleep(0.02)
        one, four = (_seconds(run, runs) for runs in (1, 4))
        added.append((four - one) / 3)
    short = statistics.median(added)
    runs = max(1, round(sustained_ms / 1e3 / short / 4))
    _seconds(run, runs)
    times = {"us": short, "us_sustained": statistics.median(_seconds(run, runs) / runs for _ in range(3))}
    return {name: round(seconds * 1e6 / calls, 2) for name, seconds in times.items()}


def _seconds(run: Callable[[], Any], runs: int) -> float:
    """Of so many, started without waiting."""
    start = time.perf_counter()
    jax.block_until_ready([run() for _ in range(runs)])
    return time.perf_counter() - start


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


class Repeated:
    """A program that makes `passes` times `run` on each of some inputs, as often as it is told.

    In a loop, because CUDA replays its body as one graph; a program without one has new places for its
    results every time, for which the graph has to be made anew. Results are kept, and given back to be
    overwritten.

    Attributes:
      calls: in a round.
      found: what they returned in the last one.
    """

    def __init__(self, run: Callable[..., Any], inputs: list[Any], passes: int):
        def one_pass(inputs: list[Any]) -> list[Any]:
            return [run(*each) for each in inputs]

        def one_round(_: Any, carry: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
            inputs, found = carry[0], []
            for _ in range(passes):
                # To XLA the next pass hangs on this one's results: it can neither hoist nor merge its calls.
                inputs, these = jax.lax.optimization_barrier((inputs, one_pass(inputs)))
                found += these  # of what nobody asks for it would make nothing
            return inputs, found

        def all_rounds(inputs: list[Any], found: list[Any], rounds: jax.Array) -> tuple[Any, jax.Array]:
            return jax.lax.fori_loop(0, rounds, one_round, (inputs, found))[1], rounds + 1

        shapes = jax.eval_shape(one_pass, inputs) * passes
        self.calls, self.inputs = passes * len(inputs), inputs
        self.found = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), shapes)
        jitted = jax.jit(all_rounds, donate_argnums=1)
        self.compiled = jitted.lower(inputs, self.found, jnp.int32(1)).compile()
        jax.block_until_ready(self(1))  # a kernel's PTX is assembled on its first run

    def __call__(self, rounds: int) -> jax.Array:
        """Something to wait for."""
        self.found, done = self.compiled(self.inputs, self.found, jnp.int32(rounds))
        return done
