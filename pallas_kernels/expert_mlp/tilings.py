"""How the two products of the experts are cut into programs: by table, measured for each kind of chip."""

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal, NamedTuple

Operands = Literal["fp4 x fp8", "fp4 x bf16", "fp8 x fp8", "fp8 x bf16"]  # weights x activations


class Tiling(NamedTuple):
    """Sizes of a launch.

    Attributes:
      rows: of weights that a program takes.
      num_warps, num_stages: as Triton means them.
    """

    rows: int
    num_warps: int
    num_stages: int


class Tilings(NamedTuple):
    """What a call uses.

    Attributes:
      rows: the number of (token, choice) rows up to which it is meant.
      tile_rows: rows of one expert in a tile.
    """

    rows: int
    tile_rows: int
    gate_up: Tiling
    down: Tiling


# Where nothing was measured: small enough for the shared memory of any chip (64 KiB on CDNA3).
DEFAULT = (
    Tilings(6144, 16, Tiling(128, 4, 2), Tiling(128, 4, 2)),
    Tilings(2**31, 64, Tiling(64, 4, 2), Tiling(64, 4, 2)),
)


@functools.cache
def tuned() -> Mapping[str, Mapping[str, Sequence[Tilings]]]:
    """The fastest measured (`tuned.json`, which `scripts/bench/expert_mlp.py --tune` writes), by arch."""
    text = resources.files(__package__).joinpath("tuned.json").read_text()
    return {
        arch: {
            operands: [
                Tilings(each["rows"], each["tile_rows"], Tiling(*each["gate_up"]), Tiling(*each["down"]))
                for each in listed
            ]
            for operands, listed in table.items()
        }
        for arch, table in json.loads(text).items()
    }


def tilings_for(arch: str, operands: Operands, rows: int) -> Tilings:
    """The tilings for so many (token, choice) rows."""
    listed = tuned().get(arch, {}).get(operands, DEFAULT)
    return next((each for each in listed if rows <= each.rows), listed[-1])
