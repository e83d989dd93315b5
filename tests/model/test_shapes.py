"""Sizes of the released models, without a byte of their weights: parameters, logits, caches."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.cache import Cache, make_cache, plan_bytes
from dsv4_jax.checkpoint.names import nest, parameters
from dsv4_jax.config import FLASH, FLASH_BASE, PRO, PRO_BASE, Config
from dsv4_jax.generate import prefill
from dsv4_jax.mtp import make_mtp_cache
from dsv4_jax.numerics import OFFICIAL, PLAIN, Numerics

MODELS = [pytest.param(FLASH, id="flash"), pytest.param(PRO, id="pro")]


def caches(config: Config, numerics: Numerics, max_len: int, max_draft: int = 0) -> Cache:
    return jax.eval_shape(lambda: make_cache(config, numerics, batch=2, max_len=max_len, max_draft=max_draft))


def shapes(tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array that a layer's cache holds, by what it is."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype.name) for path, leaf in leaves}


def expected_rows(name: str, slots: int, width: int, numerics: Numerics) -> dict:
    """How `slots` rows of two sequences are kept: index keys are 128 wide, keys and values 512."""
    format = numerics.index if width == 128 else numerics.kv
    parts = {
        None: {"": (width, numerics.dtype)},
        "fp8_block64": {
            ".nope": (448, "float8_e4m3fn"),
            ".scale": (8, "uint8"),
            ".rope": (64, numerics.dtype),
        },
        "fp4_group32": {".values": (64, "uint8"), ".scale": (4, "uint8")},
    }[format]
    return {name + part: ((2, slots, columns), dtype) for part, (columns, dtype) in parts.items()}


def expected_shapes(ratio: int, max_len: int, numerics: Numerics, extra: int = 0) -> dict:
    """What a layer keeps of two sequences, for FLASH and PRO alike; `extra` slots in every ring."""
    found = expected_rows(".window.rows", 128 + extra, 512, numerics)
    rows, channels = (8, 2) if ratio == 4 else (128, 1)
    kinds = {0: {}, 4: {"compressed": 512, "index": 128}, 128: {"compressed": 512}}[ratio]
    for name, width in kinds.items():
        found |= expected_rows(f".{name}.entries", max_len // ratio, width, numerics)
        found[f".{name}.kv.rows"] = ((2, rows + extra, channels * width), "float32")
        found[f".{name}.score.rows"] = ((2, rows + extra, channels * width), "float32")
    return found


@pytest.mark.parametrize(
    ("config", "main", "mtp"),
    [
        pytest.param(FLASH, 284_332_240_471, 6_610_048_891, id="flash"),
        pytest.param(FLASH_BASE, 284_332_240_471, 6_610_048_891, id="flash-base"),
        pytest.param(PRO, 1_572_997_201_763, 25_840_145_979, id="pro"),
        pytest.param(PRO_BASE, 1_572_997_201_763, 25_840_145_979, id="pro-base"),
    ],
)
def test_declared_parameters_add_up_to_the_published_counts(config, main, mtp):
    counts = {"main": 0, "mtp": 0}

    for parameter in parameters(config, mtp=True):
        if parameter.path[-1] != "tid2eid":  # a table, not a weight
            counts["mtp" if parameter.path[0] == "mtp" else "main"] += parameter.value.size

    assert counts == {"main": main, "mtp": mtp}


@pytest.mark.parametrize(
    ("config", "numerics"),
    [
        pytest.param(FLASH, PLAIN, id="flash-plain"),
        pytest.param(PRO, OFFICIAL, id="pro-official"),
        pytest.param(FLASH, OFFICIAL, id="flash-official", marks=pytest.mark.slow),
        pytest.param(PRO, PLAIN, id="pro-plain", marks=pytest.mark.slow),
    ],
)
def test_a_prefill_gives_logits_of_the_vocabulary_and_a_cache_like_the_one_given(config, numerics):
    params = nest({parameter.path: parameter.value for parameter in parameters(config, mtp=False)})
    tokens, row = jax.ShapeDtypeStruct((2, 256), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = caches(config, numerics, 4096)

    logits, after = jax.eval_shape(
        lambda params, *rest: prefill(config, numerics, params, *rest), params, tokens, row, row, cache
    )

    assert (logits.shape, logits.dtype) == ((2, 129280), jnp.float32)
    assert shapes(after) == shapes(cache)


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("numerics", [PLAIN, OFFICIAL], ids=["plain", "official"])
@pytest.mark.parametrize("max_len", [4096, 2**20], ids="{} tokens".format)
@pytest.mark.parametrize("max_draft", [0, 3], ids="{} drafts".format)
def test_each_layer_remembers_a_window_its_entries_and_the_raw_rows_under_way(
    config, numerics, max_len, max_draft
):
    cache = caches(config, numerics, max_len, max_draft)

    assert len(cache) == len(config.main_ratios)
    for layer, ratio in zip(cache, config.main_ratios, strict=True):
        assert shapes(layer) == expected_shapes(ratio, max_len, numerics, max_draft)


@pytest.mark.parametrize("config", MODELS)
def test_the_mtp_head_remembers_a_window_alone(config):
    cache = jax.eval_shape(lambda: make_mtp_cache(config, OFFICIAL, batch=2, max_len=2**20))

    assert shapes(cache) == expected_shapes(0, 2**20, OFFICIAL)


@pytest.mark.parametrize(
    ("config", "a_token", "at_once", "gibibytes"),
    [
        # Growth a token in quarter bytes; window, rows under way.
        pytest.param(FLASH, 4 * 3514 + 1, (3_214_336, 12_206_080), 3.45, id="flash"),
        pytest.param(PRO, 4 * 5031 + 1.75, (4_559_872, 18_710_528), 4.94, id="pro"),
    ],
)
def test_a_million_tokens_take_the_memory_of_the_plan(config, a_token, at_once, gibibytes):
    plan = plan_bytes(config, OFFICIAL, batch=2, max_len=2**20)

    assert plan["entries"] + plan["index keys"] == 2 * 2**18 * a_token
    assert (plan["window"], plan["raw rows"]) == tuple(2 * each for each in at_once)
    assert sum(plan.values()) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches(config, OFFICIAL, 2**20))
    )
    assert round(sum(plan.values()) / 2 / 2**30, 2) == gibibytes


def test_without_formats_it_takes_twice_as_much():
    plan = plan_bytes(FLASH, Numerics("bfloat16"), batch=1, max_len=2**20)

    assert round(sum(plan.values()) / 2**30, 2) == 6.74


def test_a_cache_rounds_a_length_up_to_whole_entries():
    by_ratio = dict(zip(FLASH.main_ratios, caches(FLASH, PLAIN, 130), strict=True))

    assert by_ratio[4].compressed.entries.shape[1] == 33
    assert by_ratio[128].compressed.entries.shape[1] == 2
