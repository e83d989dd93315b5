"""Measured rows are whole, and docs/benchmarks.md says what they say and nothing else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
ROWS = [
    pytest.param(row, id=f"{path.stem} {row['id']} {row['implementation']}")
    for path in sorted((BENCH / "results").glob("*.json"))
    for row in json.loads(path.read_text())
]
TARGETS = json.loads((BENCH / "targets.json").read_text())


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_render", BENCH / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_rows_say():
    done = subprocess.run([sys.executable, BENCH / "render.py", "--check"], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_what_was_measured_where_and_of_which_commit(row):
    assert row["us"] > 0
    assert all(row[field] for field in ("id", "implementation", "device", "commit", "jax", "driver"))
    if not row["id"].startswith("model "):  # a kernel, whose floor and error are known
        assert row["floor_us"] > 0
        assert 0 <= row["rel_err"] < 0.1


def test_no_id_and_implementation_is_measured_twice_on_a_device():
    keys = [(row["id"], row["implementation"], row["device"]) for (row,) in (each.values for each in ROWS)]

    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["id"])
def test_a_target_says_how_fast_the_chip_and_the_best_peer_are(target):
    assert set(target) == {"id", "floor_us", "best_peer_us", "peer", "target_us"}
    assert 0 < target["floor_us"] < target["target_us"]


TARGET = {"id": "moe T=1", "floor_us": 10, "best_peer_us": 50.5, "peer": "Marlin", "target_us": 20}


def row(id: str, implementation: str, us: float, **more) -> dict:
    facts = {"device": "NVIDIA H200", "driver": "1", "jax": "2", "commit": "abc", "date": "2026-11-24"}
    return {"id": id, "implementation": implementation, "us": us, **facts, **more}


def lines_of(page: str, id: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {id} |")]


def test_a_case_shows_its_fastest_implementation_beside_floor_peer_and_target(render):
    rows = [
        row("moe T=1", "reference", 900, floor_us=12.5, rel_err=0),
        row("moe T=1", "triton", 25, floor_us=12.5, rel_err=1.7e-3),
    ]

    page = render.render(rows, [TARGET])

    (line,) = lines_of(page, "moe T=1")
    assert line == (
        "| moe T=1 | 12.5 | 50.5 | Marlin | 20 | 25 | triton | 50% | 1.7e-03 | missed by 25% | NVIDIA H200"
        " | abc | 2026-11-24 |"
    )
    assert "0 of 1 targets met, 1 missed, 0 not measured." in page


@pytest.mark.parametrize(
    ("us", "verdict"), [(20, "target met"), (20.1, "missed by 0.5%"), (50, "missed by 150%")]
)
def test_the_verdict(render, us, verdict):
    (line,) = lines_of(render.render([row("moe T=1", "triton", us)], [TARGET]), "moe T=1")

    assert f"| {verdict} |" in line


def test_what_was_not_measured_stays_empty(render):
    page = render.render([], [TARGET | {"best_peer_us": None}])

    (line,) = lines_of(page, "moe T=1")
    assert line == "| moe T=1 | 10 |  |  | 20 |  |  |  |  | not measured | NVIDIA H200 |  |  |"
    assert "0 of 1 targets met, 0 missed, 1 not measured." in page


def test_a_row_without_a_target_or_of_another_device_is_listed_without_one(render):
    rows = [row("swiglu T=1", "triton", 2), row("moe T=1", "triton", 9) | {"device": "AMD Instinct MI300X"}]

    page = render.render(rows, [TARGET])

    assert lines_of(page, "swiglu T=1")[0].startswith(
        "| swiglu T=1 |  |  |  |  | 2 | triton |  |  |  | NVIDIA"
    )
    on_h200, on_mi300x = lines_of(page, "moe T=1")
    assert "not measured" in on_h200
    assert on_mi300x.startswith("| moe T=1 |  |  |  |  | 9 | triton |  |  |  | AMD Instinct MI300X |")


def test_cases_stand_under_the_heading_of_their_kind(render):
    ids = {
        "moe pro T=1": "Routed experts",
        "fp8 matmul x": "FP8 products",
        "router T=1": "Small ops",
        "top-k 512": "Attention and indexer",
        "model flash": "Whole model",
    }

    page = render.render([row(each, "triton", 1) for each in ids], [])

    for id, heading in ids.items():
        section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert lines_of(section, id)
