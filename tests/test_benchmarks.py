"""Measured rows are whole, docs/benchmarks.md says what they say, and what measures a model runs."""

import argparse
import importlib
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
def test_a_row_says_what_was_measured_where_and_of_which_commit(render, row):
    assert row["us"] > 0
    assert all(row[field] for field in ("id", "implementation", "device", "commit", "jax", "driver"))
    heading = render.group(row["id"])
    if heading == "Meshes":  # held against the same program without a mesh
        assert 0 <= row["of_spread"] < 0.25
    elif heading != "Start":
        assert row["floor_us"] > 0
    whole = ("One layer", "Whole model", "Start", "Meshes")
    if heading not in whole:  # a kernel, which was held against its definition
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
        "layer SWA decode B=1 ctx=4k": "One layer",
        "flash 43 layers prefill 4k": "Whole model",
        "pro 61 layers prefill 4k": "Whole model",
        "start warmup": "Start",
    }

    page = render.render([row(each, "triton", 1) for each in ids], [])

    for id, heading in ids.items():
        section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert lines_of(section, id)


@pytest.fixture(scope="module")
def decode() -> ModuleType:
    """scripts/bench/decode.py, which takes its own folder's modules with it."""
    return importlib.import_module("decode")


@pytest.fixture(autouse=True, scope="module")
def _bench_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield


def test_the_floor_of_a_step_is_the_one_that_targets_were_set_by(decode):
    floors = {target["id"]: target["floor_us"] for target in TARGETS}
    for case in map(decode.Case.parse, decode.CASES):
        assert (
            round(decode.step_us(decode.PRESETS["flash"], case.reads))
            == floors[f"flash 43 layers {case.of_model}"]
        )


@pytest.mark.parametrize("text", ["decode", "decode B=1", "decode B=1 ctx=4kk", "prefill", "prefill 4k k=1"])
def test_a_case_that_is_none_is_refused(decode, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 'decode B=1 ctx=32k'"):
        decode.Case.parse(text)


@pytest.mark.parametrize("case", ["decode B=3 ctx=1k k=2", "prefill 4k", "decode B=1 ctx=100"])
def test_a_case_is_named_as_it_is_asked_for(decode, case):
    assert decode.Case.parse(case).of_model.replace(" step", "") == case


def test_few_layers_of_a_model_are_its_first_of_each_kind(decode):
    few = decode.few_layers(decode.PRESETS["flash"], 3)

    assert few.main_ratios == (0, 0, 4, 128, 4, 128, 4, 128)
    assert few.num_hash_layers == 3


def test_a_whole_model_is_the_few_layers_measured_and_those_that_lack(decode):
    config = decode.PRESETS["flash"]
    model = decode.Model("flash", config, decode.few_layers(config, 4), None, None)
    found, fewer = ({"us": us, "us_kernels": us - 8, "launches": us / 5} for us in (1000.0, 600.0))

    total, words = decode.scaled(model, found, fewer)

    assert total == {"us": 1000 + 33 * 100, "us_kernels": 992 + 33 * 100, "launches": 200 + 33 * 20}
    assert words == "10 layers took 1000 us, 6 of them 600; +33 of 100.0"


def run_tiny(decode, tmp_path, *options: str) -> list[dict]:
    results = tmp_path / "rows.json"
    tiny = ["--model", "tiny", "--seconds", "1000", "--results", str(results)]
    assert decode.main([*tiny, *options]) == 0
    return json.loads(results.read_text())


@pytest.mark.slow
def test_a_step_with_drafts_is_measured_with_more_and_fewer_layers(decode, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "FEW", 1)
    cases = ["--cases", "decode B=3 ctx=40 k=1", "decode B=3 ctx=1M"]

    rows = run_tiny(decode, tmp_path, *cases, "--layers-of-each", "2", "--memory-gb", "0.4")

    assert [row["id"] for row in rows] == [
        f"tiny {count} layers decode step B=3 ctx=40 k=1" for count in (5, 3, 5)
    ]
    found, fewer, whole = rows  # the five are all there are
    assert found["us"] == whole["us"]
    assert fewer["us"] > 0
    assert whole["tokens_per_second_if_all_stand"] == pytest.approx(2 * whole["tokens_per_second"], rel=1e-3)
    assert all(row["us"] > row["us_host"] > 0 < row["floor_us"] for row in (found, fewer))
    assert "5 layers decode step B=3 ctx=1M: left out, takes" in capsys.readouterr().out


def test_a_layer_costs_what_a_model_without_it_does_not_take(decode, tmp_path):
    rows = run_tiny(
        decode, tmp_path, "--cases", "prefill 40", "--layers-of-each", "1", "--piece", "16", "--kinds", "HCA"
    )

    assert [(row["id"], row.get("piece")) for row in rows] == [
        ("tiny 3 layers prefill 40", 16),
        ("layer tiny HCA prefill 40", 16),
    ]
    whole, layer = rows
    assert layer["us"] < whole["us"]
    assert 0 < layer["floor_us"] < whole["floor_us"]


@pytest.mark.slow
def test_a_prefill_is_read_in_pieces_in_each_mode(decode, tmp_path):
    piece, modes = ["--piece", "16"], ["--modes", "default", "serialized"]

    rows = run_tiny(decode, tmp_path, "--cases", "prefill 40", "--layers-of-each", "1", *piece, *modes)

    assert [(row["id"], row["implementation"], row["piece"]) for row in rows] == [
        ("tiny 3 layers prefill 40", mode, 16) for mode in modes[1:]
    ]


def test_no_time_is_no_row(decode, tmp_path, capsys):
    results = tmp_path / "rows.json"

    decode.main(["--model", "tiny", "--layers-of-each", "1", "--seconds", "0", "--results", str(results)])

    assert json.loads(results.read_text()) == []
    assert "3 layers decode step B=1 ctx=32k: left out" in capsys.readouterr().out


def test_caches_that_are_copied_are_counted(decode):
    hlo = (
        "%a = bf16[2,3]{1,0} copy(%b)\n%c = f32[4]{0} fusion(%copy.1)\n"
        "ROOT %d = (f32[5]{0}, u32[]) copy-start(%e)"
    )

    assert decode.copied_bytes(hlo) == 2 * 3 * 2 + 5 * 4
