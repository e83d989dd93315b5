#!/usr/bin/env python3
"""Writes docs/benchmarks.md from the rows in scripts/bench/results and the targets beside this script.

python scripts/bench/render.py            writes it
python scripts/bench/render.py --check    exit code 1 if it is not what the rows say
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
TARGET_DEVICE = "NVIDIA H200"  # of the floors, peers and targets in targets.json

Row = dict[str, Any]

# Headings, and how the ids below them begin; an id that begins otherwise is a small op.
GROUPS = {
    "Routed experts": ("moe ",),
    "FP8 products": ("fp8 ",),
    "Small ops": (),
    "Attention and indexer": ("sparse attention ", "indexer ", "top-k "),
    "One layer": ("layer ",),
    "Whole model": ("flash ", "pro "),
    "Meshes": ("mesh ",),
    "Start": ("start ",),
}

INTRODUCTION = """# Benchmarks

Written by `scripts/bench/render.py` from `scripts/bench/results/*.json` and `scripts/bench/targets.json`; do
not edit. Times are microseconds of one call; those of kernels are of many calls in one program, caches cold,
in short runs where the row also has a sustained time, else under load that lasts. Those of layers and models
are of programs that are started without waiting (`decode.py`, which also says how all layers follow from the
few that fit).
The *floor* is the longer of moving every byte once and doing the arithmetic at the chip's rate. *Peers* are
other projects' kernels, measured by us at the same shape on the same kind of machine unless they are called
published. *Ours* is the fastest implementation that has a row. The *error* is relative to the definition in
float32, from the run that timed it. What nobody measured is empty.
"""

COLUMNS = (
    "case", "floor us", "best peer us", "peer", "target us", "ours us", "implementation", "share of floor",
    "error", "verdict", "device", "commit", "date",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    page = render(results(), targets()) + render_compiled(compiled())
    if not check:
        PAGE.write_text(page)
        print(f"{PAGE} written")
        return 0
    if PAGE.exists() and PAGE.read_text() == page:
        return 0
    print(f"{PAGE} is stale: run python scripts/bench/render.py", file=sys.stderr)
    return 1


def results() -> list[Row]:
    """The rows of all results files."""
    return [row for path in sorted((HERE / "results").glob("*.json")) for row in json.loads(path.read_text())]


def targets() -> list[Row]:
    return json.loads((HERE / "targets.json").read_text())


def compiled() -> list[Row]:
    """The rows of programs that were compiled for machines that are not here."""
    path = HERE.parent / "aot" / "results.json"
    return json.loads(path.read_text()) if path.exists() else []


COMPILED = """
## Compiled for machines that are not here

By `scripts/aot/compile.py`: whole released models, parameters and caches as shapes, {slots} requests of
{max_len} tokens; XLA's own memory analysis, bytes of one device. Nothing of this has run. A decode step
gathers neither weights nor caches: the script asserts it on the compiled text. Sums are those of layers, and
of drawing a token.

| case | program | devices | GiB a device | weights | workspace | sums | gathers | exchanges | compiled in s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def render_compiled(rows: Sequence[Row]) -> str:
    """A table of these rows; nothing if there are none."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        counts = [_exchanged(row, name) for name in ("all-reduce", "all-gather", "all-to-all")]
        sizes = [f"{row[name]:.2f}" for name in ("gib", "parameters_gib", "workspace_gib")]
        cells = [row["case"], row["program"], row["devices"], *sizes, *counts, f"{row['compile_s']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return COMPILED.format(**rows[0]) + "\n".join(lines) + "\n"


def _exchanged(row: Row, name: str) -> str:
    found = row["collectives"].get(name)
    return f"{found['count']} ({found['nbytes'] / 2**20:.2f} MiB)" if found else ""


def render(rows: Sequence[Row], targets: Sequence[Row]) -> str:
    """The page; cases stand in the order of the targets, those without one after them."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["id"], row["device"])
        best[key] = min(best.get(key, row), row, key=lambda row: row["us"])
    wanted = {(target["id"], TARGET_DEVICE): target for target in targets}
    cases = dict.fromkeys([*wanted, *best])
    met = [wanted[key]["target_us"] >= best[key]["us"] for key in cases if key in wanted and key in best]
    lines = [
        INTRODUCTION,
        f"{sum(met)} of {len(wanted)} targets met, {len(met) - sum(met)} missed,"
        f" {len(wanted) - len(met)} not measured.",
    ]
    for heading in GROUPS:
        keys = [key for key in cases if group(key[0]) == heading]
        if keys:
            lines += ["", f"## {heading}", "", *table(_cells(k, best.get(k), wanted.get(k)) for k in keys)]
    return "\n".join(lines) + "\n"


def group(case: str) -> str:
    """The heading that a case stands under."""
    return next((each for each, beginnings in GROUPS.items() if case.startswith(beginnings)), "Small ops")


def table(rows: Iterator[Sequence[str]]) -> Iterator[str]:
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        yield f"| {' | '.join(cells)} |"


def _cells(key: tuple[str, str], row: Row | None, target: Row | None) -> list[str]:
    case, device = key
    row, target = row or {}, target or {}
    us, floor, goal = row.get("us"), row.get("floor_us", target.get("floor_us")), target.get("target_us")
    peer = target.get("best_peer_us")
    return [
        case,
        _number(floor),
        _number(peer),
        target["peer"] if peer is not None else "",
        _number(goal),
        _number(us),
        row.get("implementation", ""),
        f"{floor / us:.0%}" if us and floor else "",
        f"{row['rel_err']:.1e}" if "rel_err" in row else "",
        _verdict(us, goal),
        device,
        row.get("commit", ""),
        row.get("date", ""),
    ]


def _number(us: float | None) -> str:
    """Four digits, or all before the point."""
    if us is None:
        return ""
    return f"{us:,.0f}" if us >= 1000 else f"{us:.4g}"


def _verdict(us: float | None, goal: float | None) -> str:
    if us is None:
        return "not measured"
    if goal is None:
        return ""
    if us <= goal:
        return "target met"
    excess = us / goal - 1
    return f"missed by {excess:.0%}" if excess >= 0.1 else f"missed by {excess:.1%}"


if __name__ == "__main__":
    sys.exit(main())
