#!/usr/bin/env python3
"""Times decode steps of a few layers at full width on meshes of GPUs, beside the same without a mesh.

Each mesh runs the program of `decode.py` on the same made-up numbers. Its log-probabilities of the tokens
that rows are told are held against those without a mesh: in the released arithmetic, whose roundings amplify
in which order terms are added, they differ by a small part of their spread; where a mesh is wrong, by all of
it. Programs are timed in turns, so that a chip's clocks are alike for all.

  python scripts/bench/mesh.py --meshes "tp=1 tp+ep"                        what it costs to have a mesh
  python scripts/bench/mesh.py --meshes "tp=2 tp" "tp=2 ep" "dp=2 tp+ep"    on two GPUs

Without a GPU: XLA_FLAGS=--xla_force_host_platform_device_count=2 ... --model tiny --cases "decode B=2 ctx=64"
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # by default JAX takes three quarters

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from decode import Case, Model, few_layers, works
from harness import facts, save
from made_up import made_up_params

from dsv4_jax.checkpoint.layouts import Layout
from dsv4_jax.checkpoint.names import nest, parameters
from dsv4_jax.cli.options import mesh_sizes
from dsv4_jax.config import PRESETS, Config
from dsv4_jax.engine import STEPS_ON_GPU
from dsv4_jax.parallel import on_all, settled
from dsv4_jax.sharding import DEFAULT_RULES, RULES, Placement, make_mesh, on_mesh, placements
from pallas_kernels import current_target

BOUND = 0.25  # of the spread of log-probabilities


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mesh and its rules; without a mesh, one device."""

    name: str
    mesh: jax.sharding.Mesh | None
    rules: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "tp=2,dp=1 ep"."""
        ways, rules = text.split()
        sizes = mesh_sizes(ways)
        return cls(text, make_mesh(*(sizes.get(name, 1) for name in ("dp", "ep", "tp"))), rules)

    def params(self, config: Config, raw: dict[Any, Any]) -> Any:
        """The model's parameters as `checkpoint.load` would lay them out, from those of a checkpoint."""
        declared, mesh, rules = parameters(config, mtp=False), self.mesh, RULES[self.rules]
        layout = Layout(current_target(), mesh, rules, {each.path: each.axes for each in declared})
        for each in declared:
            value = raw[each.path]
            if mesh is not None:
                places = placements(config, mesh, rules, each.axes, each.value)
                value = jax.tree.map(_placed, value, places)
            layout.take(each.path, value)
        return nest(layout.leaves)


def _placed(array: jax.Array, place: Placement) -> jax.Array:
    assert place.pieces == 1, "more devices than groups of heads"
    filling = [(0, size - own) for size, own in zip(place.shape, array.shape, strict=True)]
    return jax.device_put(jnp.pad(array, filling), place.sharding)


class Run:
    """The decode steps of a case on a mesh, compiled."""

    def __init__(self, model: Model, case: Case, spread: Spread, steps: int):
        self.spread, self.params = spread, (model.params, None)
        work = works(model, case, 1, steps)[0]
        with on_mesh(spread.mesh, spread.rules):
            self.state = work.state()
            if spread.mesh is not None:
                rows = settled({name: self.state[name] for name in ("requests", "sequences")})
                told = on_all({name: self.state[name] for name in ("forced", "most")})
                self.state = rows | told
            begin = time.perf_counter()

            def advance(params: Any, state: Any) -> Any:
                found, state = work.advance(params, state)
                return on_all(found), state

            places = None if spread.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, self.state)
            program = jax.jit(advance, donate_argnums=1, out_shardings=(None, places))
            self.advance = program.lower(self.params, self.state).compile()
        self.compile_s = time.perf_counter() - begin

    def __call__(self) -> jax.Array:
        found, self.state = self.advance(self.params, self.state)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meshes", nargs="+", default=["tp=1 tp+ep"], help="sizes and rules")
    cases = ["decode B=1 ctx=32k", "decode B=32 ctx=32k"]
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(each) for each in cases])
    parser.add_argument("--model", choices=list(PRESETS), default="flash")
    parser.add_argument("--layers-of-each", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20, help="of a program, in one round")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    options = parser.parse_args()
    whole = PRESETS[options.model]
    config = few_layers(whole, options.layers_of_each)
    spreads = [Spread("none", None, DEFAULT_RULES), *map(Spread.parse, options.meshes)]
    raw = _flat(config)
    models = [Model(options.model, whole, config, spread.params(config, raw), None) for spread in spreads]
    jax.block_until_ready([model.params for model in models])
    del raw
    print(f"# {config.num_hidden_layers} layers on {len(spreads)} meshes", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            (case, spread.name): pool.submit(Run, model, case, spread, STEPS_ON_GPU)
            for case in options.cases
            for spread, model in zip(spreads, models, strict=True)
        }
    wrong = 0
    for case in options.cases:
        runs = {}
        for spread in spreads:
            try:
                runs[spread.name] = futures[case, spread.name].result()
            except Exception as error:  # one program's failure leaves the others their turn
                wrong += 1
                print(f"{case.of_model} {spread.name}: {type(error).__name__} {str(error)[:500]}", flush=True)
        rows = measured(case, config, runs, options)
        wrong += sum(row["of_spread"] > BOUND for row in rows)
        if options.results:
            save(rows, options.results)
    return 1 if wrong else 0


def _flat(config: Config) -> dict[Any, Any]:
    """Made-up parameters by path, as a checkpoint has them."""
    made, _ = made_up_params(config, laid_out=False)

    def at(path: tuple[Any, ...]) -> Any:
        found = made
        for name in path:
            found = found[name]
        return found

    return {each.path: at(each.path) for each in parameters(config, mtp=False)}


def measured(
    case: Case, config: Config, runs: dict[str, Run], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each mesh: how far off, and microseconds of a step in rounds of all of them by turns."""
    first = {name: np.asarray(run(), np.float64) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready([run() for _ in range(options.calls)])
            times[name].append((time.perf_counter() - begin) / options.calls / STEPS_ON_GPU * 1e6)
    rows, alone = [], first.get("none")
    without = statistics.median(times["none"][1:]) if alone is not None else float("nan")
    for name, run in runs.items():
        us = [round(each, 1) for each in times[name][1:]]
        error = (
            float("nan")
            if alone is None
            else np.linalg.norm(first[name] - alone) / np.linalg.norm(alone - alone.mean())
        )
        rows.append(
            {
                "id": f"mesh {name}: {options.model} {config.num_hidden_layers} layers {case.of_model}",
                "us": statistics.median(us),
                "us_rounds": us,
                "us_without_mesh": round(without, 1),
                "of_spread": round(float(error), 5),
                "devices": 1 if run.spread.mesh is None else run.spread.mesh.size,
                "compile_s": round(run.compile_s, 1),
                "implementation": "default",
            }
            | facts()
        )
        print(
            f"{rows[-1]['id']}: {rows[-1]['us']} us, off by {error:.1e} of the spread; rounds {us}",
            flush=True,
        )
    if alone is not None:
        for name in runs:
            ratio = statistics.median(a / b for a, b in zip(times[name][1:], times["none"][1:], strict=True))
            print(f"  {name}: {100 * (ratio - 1):+.1f}% of a step without a mesh", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
