"""The name table against the published tensor lists, both ways, and what it says of DSpark drafts."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest

from dsv4_jax.checkpoint.names import TABLE, expected_tensors, is_shared_copy, nest, parameters
from dsv4_jax.config import FLASH, PRESETS, PRO, TINY, Config
from dsv4_jax.weight_files import DTYPES

SCHEMAS = Path(__file__).parent.parent / "data" / "tensor_schema"

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def published(name: str) -> Tensors:
    """dtype and shape of every tensor of a release."""
    schema = json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))
    tensors = {}
    for pattern, (dtype, shape) in schema["tensors"].items():
        for expert in range(schema["n_routed_experts"] if "{E}" in pattern else 1):
            tensors[pattern.replace("{E}", str(expert))] = dtype, tuple(shape)
    return tensors


def with_dspark(config: Config, *, rank: int) -> Config:
    """`config` as the later releases have it, whose draft is DSpark's three stages."""
    return dataclasses.replace(
        config,
        compress_ratios=(*config.main_ratios, 0, 0, 0),
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layer_ids=tuple(range(config.num_hidden_layers - 3, config.num_hidden_layers)),
        dspark_markov_rank=rank,
    )


def count_and_bytes(tensors: Tensors) -> tuple[int, int]:
    nbytes = (math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in tensors.values())
    return len(tensors), sum(nbytes)


@pytest.mark.parametrize("name", ["flash", "flash-base", "pro"])
def test_the_table_and_the_published_list_name_the_same_tensors(name):
    found, wanted = expected_tensors(PRESETS[name], mtp=True), published(name)

    assert not wanted.keys() - found.keys()
    assert not found.keys() - wanted.keys()
    assert found == wanted


@pytest.mark.parametrize(
    ("config", "tensors", "nbytes"),
    [
        (PRESETS["flash"], 69_187, 159_609_485_896),
        (PRESETS["flash-base"], 69_187, 292_555_345_480),
        (PRESETS["pro"], 145_116, 864_704_792_696),
        (with_dspark(FLASH, rank=256), 72_317, 166_878_536_440),
        (with_dspark(PRO, rank=512), 149_782, 892_727_580_904),
    ],
    ids=["Flash", "Flash-Base", "Pro", "Flash-0731", "Pro-0813"],
)
def test_a_release_has_as_many_tensors_and_bytes_as_its_index_says(config, tensors, nbytes):
    assert count_and_bytes(expected_tensors(config, mtp=True)) == (tensors, nbytes)


def test_the_main_model_of_flash_is_67612_tensors_whatever_it_drafts_with():
    main = expected_tensors(FLASH, mtp=False)

    assert len(main) == 67_612
    assert main == expected_tensors(with_dspark(FLASH, rank=256), mtp=False)
    assert not any(name.startswith("mtp.") for name in main)


def test_a_dspark_draft_is_three_blocks_with_an_entrance_and_a_head():
    tensors = expected_tensors(with_dspark(FLASH, rank=256), mtp=True)
    block = {name.removeprefix("layers.5.") for name in tensors if name.startswith("layers.5.")}

    beside_blocks = {
        name: stored
        for name, stored in tensors.items()
        if name.startswith("mtp.") and name.split(".", 2)[2] not in block
    }

    assert beside_blocks == {
        "mtp.0.main_proj.weight": ("F8_E4M3", (4096, 12288)),
        "mtp.0.main_proj.scale": ("F8_E8M0", (32, 96)),
        "mtp.0.main_norm.weight": ("BF16", (4096,)),
        "mtp.2.norm.weight": ("BF16", (4096,)),
        "mtp.2.hc_head_fn": ("F32", (4, 16384)),
        "mtp.2.hc_head_base": ("F32", (4,)),
        "mtp.2.hc_head_scale": ("F32", (1,)),
        "mtp.2.markov_head.markov_w1.weight": ("BF16", (129280, 256)),
        "mtp.2.markov_head.markov_w2.weight": ("BF16", (129280, 256)),
        "mtp.2.confidence_head.proj.weight": ("BF16", (1, 4352)),
    }


def test_every_row_of_the_table_is_of_use_and_said_once():
    drafts = (FLASH, with_dspark(FLASH, rank=256))
    used = {each.entry for config in drafts for each in parameters(config, mtp=True)}
    of_draft_blocks = {
        entry for entry in TABLE if ".block." in entry.parameter
    }  # those of every kind of layer

    assert set(TABLE) - of_draft_blocks <= used
    assert len({entry.tensor for entry in TABLE}) == len({entry.parameter for entry in TABLE}) == len(TABLE)


def test_a_config_without_a_draft_has_no_mtp_tensors():
    config = dataclasses.replace(TINY, num_nextn_predict_layers=0, compress_ratios=TINY.main_ratios)

    assert expected_tensors(config, mtp=True) == expected_tensors(TINY, mtp=False)


@pytest.mark.parametrize("name", ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight", "mtp.2.head.weight"])
def test_copies_of_embedding_and_head_are_known_as_such(name):
    assert is_shared_copy(name)


def test_no_tensor_of_a_release_is_taken_for_a_copy():
    names = [*expected_tensors(FLASH, mtp=True), *expected_tensors(with_dspark(FLASH, rank=256), mtp=True)]

    assert not any(map(is_shared_copy, names))


def test_parameters_come_in_layer_order_and_nest_into_one_tree():
    leaves = {each.path: each.entry.tensor for each in parameters(TINY, mtp=True)}

    params = nest(leaves)

    assert list(params["layers"]) == list(range(TINY.num_hidden_layers))
    assert params["layers"][3]["ffn"]["experts"]["w2"] == "layers.{layer}.ffn.experts.{expert}.w2"
    assert params["mtp"][0]["block"]["attn"]["wkv"]["weight"] == "mtp.{layer}.attn.wkv"
    assert set(params) == {"embed", "layers", "hc_head", "norm", "head", "mtp"}
