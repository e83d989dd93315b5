#!/usr/bin/env python3
"""Compiles the real prefill and decode programs for machines that are not here, and tells what they take.

Parameters and caches are shapes alone, kernels are compiled for the machine, and XLA compiles the rest as it
would there. What comes out: bytes a device by XLA's own analysis, the collectives of a decode step with their
bytes, and seconds. The exit code is 1 if a decode step gathers a weight or a cache, or does not fit.

XLA's plugins are needed, no driver:

  pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm
  pip install --no-deps jax-rocm7-pjrt jax-rocm7-plugin        (and gcc and readelf)

  python scripts/aot/compile.py --results scripts/aot/results.json
  python scripts/aot/compile.py --cases "flash h200 tp=8 ep" --layers 4
"""

import argparse
import collections
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parent))

import jax
import machines
import programs

from dsv4_jax.cli.options import mesh_sizes
from dsv4_jax.config import PRESETS, Config
from dsv4_jax.numerics import OFFICIAL
from dsv4_jax.sharding import RULES, make_mesh, on_mesh
from pallas_kernels.target import assume

CASES = (
    "flash h200 tp=4 ep",
    "flash h200 tp=8 ep",
    "pro h200 tp=16 ep",
    "pro h200 tp=16,ep=4 dp-attention",
    "pro mi300x tp=8 ep",
    "pro mi300x tp=16 ep",
)
SLOTS, MAX_LEN, PIECE = 32, 32768, 512
_COLLECTIVE = re.compile(
    r"= (?P<shape>.+?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_WIDTH = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e4m3fnuz": 1,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh of a kind of machine."""

    name: str
    config: Config
    machine: machines.Machine
    sizes: dict[str, int]
    rules: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "pro h200 tp=16,ep=4 dp-attention"."""
        model, machine, sizes, rules = text.split()
        return cls(text, PRESETS[model], machines.MACHINES[machine], mesh_sizes(sizes), rules)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(each) for each in CASES])
    parser.add_argument("--layers", type=int, help="only the first so many, to try it out")
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--max-len", type=int, default=MAX_LEN)
    parser.add_argument("--results", type=Path, help="JSON to add the rows to")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs' text")
    arguments = parser.parse_args()
    sound = True
    for case in arguments.cases:
        for row in compile_case(case, arguments):
            print(json.dumps(row), flush=True)
            sound &= not row["gathered"] and row["gib"] <= case.machine.memory_gib
            if arguments.results and not arguments.layers:
                save(arguments.results, row)
    return 0 if sound else 1


def compile_case(case: Case, arguments: argparse.Namespace):
    """A row for the decode step and one for a piece of a prompt."""
    config = shortened(case.config, arguments.layers) if arguments.layers else case.config
    count = 1
    for size in case.sizes.values():
        count *= size
    mesh = make_mesh(**case.sizes, devices=machines.devices(case.machine, count))
    kernels = machines.compile_kernels_for(case.machine)
    rules = RULES[case.rules]
    with on_mesh(mesh, rules), assume(case.machine.target):
        params = programs.parameter_shapes(config, mesh, rules, case.machine.target)
        sizes = arguments.slots, arguments.max_len
        allowed = 16 * arguments.slots * count  # for each row and device a few numbers
        for program in ("decode", "prefill"):
            begin = time.perf_counter()
            if program == "decode":
                traced = programs.decode_step(config, OFFICIAL, params, *sizes)
            else:
                traced = programs.prefill_piece(config, OFFICIAL, params, *sizes, PIECE)
            lowered = traced.lower(lowering_platforms=(case.machine.platform,))
            middle = time.perf_counter()
            compiled = lowered.compile()
            end = time.perf_counter()
            text = compiled.as_text()
            if arguments.hlo:
                arguments.hlo.mkdir(parents=True, exist_ok=True)
                (arguments.hlo / f"{case.name} {program}.hlo".replace(" ", "_")).write_text(text)
            memory = compiled.memory_analysis()
            total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            total += memory.output_size_in_bytes - memory.alias_size_in_bytes
            yield {
                "case": case.name,
                "program": program,
                "layers": config.num_hidden_layers,
                "devices": count,
                "slots": arguments.slots,
                "max_len": arguments.max_len,
                "gib": round(total / 2**30, 2),
                "parameters_gib": round(shard_bytes(params) / 2**30, 2),
                "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
                "workspace_gib": round(memory.temp_size_in_bytes / 2**30, 3),
                "collectives": collectives(text),
                "gathered": gathered(text, allowed) if program == "decode" else [],
                "kernel_calls": text.count(f'custom_call_target="{machines.KERNEL}"')
                + text.count("mosaic_gpu"),
                "kernels": len(kernels),
                "trace_s": round(middle - begin, 1),
                "compile_s": round(end - middle, 1),
            }


def shortened(config: Config, layers: int) -> Config:
    ratios = (*config.main_ratios[:layers], 0)
    return dataclasses.replace(config, num_hidden_layers=layers, compress_ratios=ratios)


def shards(params: Any) -> list[tuple[int, ...]]:
    return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]


def shard_bytes(params: Any) -> int:
    leaves = jax.tree.leaves(params)
    return sum(
        leaf.dtype.itemsize * _product(shard) for leaf, shard in zip(leaves, shards(params), strict=True)
    )


def collectives(text: str) -> dict[str, dict[str, int]]:
    """How many of each kind a program has, and the bytes of their results."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "nbytes": 0})
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            found[match["op"]]["count"] += 1
            found[match["op"]]["nbytes"] += _result_bytes(match)
    return dict(found)


def gathered(text: str, allowed: int) -> list[str]:
    """All-gathers of more than so many bytes: of weights or caches, as candidates for a token are few."""
    matches = ((line, _COLLECTIVE.search(line)) for line in text.splitlines())
    return [
        line.strip()[:160]
        for line, match in matches
        if match and match["op"] == "all-gather" and _result_bytes(match) > allowed
    ]


def _result_bytes(match: re.Match[str]) -> int:
    """Of what arrives; an asynchronous one lists what is sent before it."""
    arrays = [(_WIDTH.get(dtype, 4), size) for dtype, size in _ARRAY.findall(match["shape"])]
    arrived = arrays[len(arrays) // 2 :] if match[3] and match["op"] == "all-gather" else arrays
    return sum(width * _product(map(int, size.split(","))) if size else width for width, size in arrived)


def _product(sizes: Any) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def save(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    key = ("case", "program", "slots", "max_len")
    rows = [each for each in rows if any(each[name] != row[name] for name in key)] + [row]
    path.write_text(json.dumps(sorted(rows, key=lambda each: [each[name] for name in key]), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
