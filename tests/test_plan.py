"""Memory plans: exact sums of their parts, and what XLA says of the compiled programs."""

import json
import re
from pathlib import Path

import pytest

from dsv4_jax.cli import main
from dsv4_jax.config import FLASH, PRESETS, PRO, TINY
from dsv4_jax.numerics import OFFICIAL, PLAIN
from dsv4_jax.plan import MemoryPlan, plan_memory
from dsv4_jax.sharding import RULES

COMPILED = Path(__file__).parents[1] / "scripts" / "aot" / "results.json"
ROWS = json.loads(COMPILED.read_text()) if COMPILED.exists() else []
LARGER = [
    max((each for each in ROWS if each["case"] == case), key=lambda each: each["gib"])
    for case in dict.fromkeys(each["case"] for each in ROWS if each["program"] == "prefill")
]


def plan_of(config, sizes=(1, 1, 8), rules="ep", **options) -> MemoryPlan:
    options = {"slots": 32, "max_len": 32768, "device_nbytes": 141 * 2**30} | options
    return plan_memory(config, sizes, RULES[rules], OFFICIAL, **options)


@pytest.mark.parametrize("row", LARGER, ids=lambda row: row["case"])
def test_a_plan_agrees_with_the_larger_of_the_compiled_programs(row):
    model, _, mesh, rules = row["case"].split()
    sizes = {name: int(size) for name, size in re.findall(r"(\w\w)=(\d+)", mesh)}
    shape = tuple(sizes.get(name, 1) for name in ("dp", "ep", "tp"))

    found = plan_of(PRESETS[model], shape, rules, slots=row["slots"], max_len=row["max_len"])

    assert found.nbytes / 2**30 == pytest.approx(row["gib"], rel=0.05)


def test_weights_are_those_of_the_checkpoint():
    found = plan_of(FLASH, (1, 1, 1))

    # The published bytes, of which three tables are halved on the way; the MTP head is left out.
    assert found.parts["experts"] + found.parts["dense"] == pytest.approx(159_609_485_896 * 0.977, rel=0.01)
    assert not found.fits


def test_what_it_says_fits_does_and_one_more_does_not():
    found = plan_of(FLASH)

    assert plan_of(FLASH, slots=found.most_slots).fits
    assert not plan_of(FLASH, slots=found.most_slots + 1).fits
    assert (
        found.longest == FLASH.max_position_embeddings or not plan_of(FLASH, max_len=found.longest + 1).fits
    )


def test_the_rules_for_long_contexts_split_entries_and_keys():
    whole, split = (plan_of(PRO, (1, 1, 16), rules, max_len=2**20) for rules in ("ep", "context"))

    assert split.parts["index keys"] == whole.parts["index keys"] // 16
    assert split.parts["window"] == whole.parts["window"]


def test_copies_of_the_model_share_the_requests():
    one, four = (
        plan_memory(TINY, (dp, 1, 1), RULES["tp"], PLAIN, slots=4, max_len=64, device_nbytes=2**30)
        for dp in (1, 4)
    )

    assert four.parts["entries"] == one.parts["entries"] // 4
    assert four.parts["experts"] == one.parts["experts"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pro", "--mesh", "tp=16", "--rules", "ep"], 0, "32 requests of 32,768 tokens: fits"),
        (["pro", "--mesh", "tp=4", "--rules", "ep"], 77, "does not fit"),
        (["flash", "--mesh", "tp=3"], 2, "tp = 3 cannot split num_attention_heads 64"),
        (
            ["flash", "--mesh", "tp=8", "--svg", "/nowhere/plan.svg"],
            73,
            "/nowhere/plan.svg cannot be written",
        ),
        (["/nowhere"], 66, "no such directory"),
    ],
)
def test_the_command_says_what_fits(arguments, code, said, capsys):
    assert main(["plan", *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_the_command_draws_and_gives_json(tmp_path, capsys):
    assert main(["plan", "flash", "--mesh", "tp=8", "--json", "--svg", str(tmp_path / "plan.svg")]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["nbytes"] == sum(told["parts"].values())
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.startswith("<svg")
    assert drawn.count("<rect") == len(told["parts"])
