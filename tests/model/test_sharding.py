"""Rules and meshes: where each part of the model lies, and meshes over which it cannot lie."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import FLASH, FLASH_BASE, PRO, PRO_BASE, TINY
from dsv4_jax.errors import MemoryPlanError
from dsv4_jax.sharding import (
    MESH_AXES,
    RULES,
    Placement,
    check_mesh,
    constrain,
    current_rules,
    make_mesh,
    on_mesh,
    placements,
    resolve,
    spec,
)

CONFIGS = [
    pytest.param(FLASH, id="flash"),
    pytest.param(FLASH_BASE, id="flash-base"),
    pytest.param(PRO, id="pro"),
    pytest.param(PRO_BASE, id="pro-base"),
]


def mesh_of(dp: int, ep: int, tp: int) -> Mesh:
    """Of devices that need not exist: nothing is put on them."""
    return AbstractMesh((dp, ep, tp), MESH_AXES)  # type: ignore[return-value]


def places_of(config, mesh, rules, path):
    """The placements of the parameter at this path of layer 3: of its values, and of its scale."""
    wanted = ("layers", 3, *path.split("."))
    found = next(each for each in parameters(config, mtp=False) if each.path == wanted)
    places = placements(config, mesh, RULES[rules], found.axes, found.value)
    return jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))


def parts(place: Placement) -> list[tuple[range, ...]]:
    """What each device has of the stored array, of which one dimension is split over all devices."""
    (split,) = (number for number, axis in enumerate(place.sharding.spec) if axis)
    width = place.sharding.shard_shape(place.shape)[split]
    indices = [[slice(None)] * len(place.shape) for _ in range(0, place.shape[split], width)]
    for number, index in enumerate(indices):
        index[split] = slice(number * width, (number + 1) * width)
    return [place.source(tuple(index)) for index in indices]


# Rules.


def test_a_spec_follows_the_rules():
    assert spec("experts", "expert_hidden", "hidden") == PartitionSpec("expert", "tensor", None)
    assert spec("vocab", None) == PartitionSpec(("expert", "tensor"), None)
    whole_heads = dataclasses.replace(RULES["tp"], heads=())
    assert spec("heads", rules=whole_heads) == PartitionSpec(None)


@pytest.mark.parametrize(
    "axes",
    [("heads", "expert_hidden"), ("vocab", "heads"), ("experts", "vocab")],
    ids=["part of a pair", "the same pair", "a pair after an axis"],
)
def test_two_dimensions_on_one_mesh_axis_are_refused_by_name(axes):
    with pytest.raises(ValueError, match=f"'{axes[0]}', '{axes[1]}'.* two dimensions over one mesh axis"):
        spec(*axes)


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(AttributeError, match="wings"):
        spec("batch", "wings")


def test_rules_hold_inside_of_on_mesh_only():
    with on_mesh(make_mesh(), "ep"):
        assert current_rules() == RULES["ep"]
    assert current_rules() == RULES["tp+ep"]


def test_a_batch_is_split_over_those_axes_that_divide_it():
    mesh = {"data": 2, "expert": 4, "tensor": 1}

    split = [resolve(RULES["dp-attention"], mesh, {"batch": size}).batch for size in (16, 4, 6, 1)]

    assert split == [("data", "expert"), ("expert",), (), ()]


def test_without_a_mesh_constraints_do_nothing():
    x = jnp.ones((2, 3))

    assert constrain(x, "batch", "hidden") is x


# Parameters.


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_of_the_models_lies_where_its_axes_say_and_nowhere_else(config, rules):
    mesh = mesh_of(2, 2, 4)

    for parameter in parameters(config, mtp=True):
        places = placements(config, mesh, RULES[rules], parameter.axes, parameter.value)
        leaves = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
        for leaf, place in zip(jax.tree.leaves(parameter.value), leaves, strict=True):
            assert place.shape == leaf.shape, parameter.path  # all blocks come out even
            assert place.sharding.spec == spec(*parameter.axes, rules=RULES[rules]), parameter.path
            assert place.sharding.shard_shape(place.shape)  # raises where a dimension does not divide


def test_blocks_that_do_not_come_out_even_leave_the_last_devices_fewer():
    values, scale = places_of(PRO, mesh_of(1, 1, 16), "tp+ep", "ffn.shared_experts.w1.weight")

    assert values.shape == (16 * 256, 7168)  # of 3072 rows: 24 blocks of 128, two for a device
    assert [len(rows) for rows, _ in parts(values)] == [256] * 12 + [0] * 4
    assert [len(rows) for rows, _ in parts(scale)] == [2] * 12 + [0] * 4
    rows = [row for rows, _ in parts(values) for row in rows]
    assert rows == list(range(3072))


def test_packed_columns_split_where_their_numbers_do():
    values, scale = places_of(PRO, mesh_of(1, 1, 16), "tp", "ffn.experts.w2")

    assert [columns for _, _, columns in parts(values)][:2] == [range(128), range(128, 256)]  # two a byte
    assert [columns for _, _, columns in parts(scale)][:2] == [range(8), range(8, 16)]  # 32 a scale


@pytest.mark.parametrize("devices", [12, 24])
def test_experts_of_pro_lie_on_12_and_24_devices(devices):
    mesh = mesh_of(1, devices, 1)

    check_mesh(PRO, mesh.shape, RULES["dp-attention"])
    values, _ = places_of(PRO, mesh, "dp-attention", "ffn.experts.w1")
    assert [len(experts) for experts, _, _ in parts(values)] == [384 // devices] * devices


def test_devices_that_share_a_group_of_heads_have_a_piece_of_its_columns_each():
    values, scale = places_of(FLASH, mesh_of(1, 1, 16), "tp+ep", "attn.wo_a.weight")

    assert values.shape == (16 * 1024, 2048)  # 8 groups of 1024 rows and 4096 columns
    assert parts(values)[:3] == [
        (range(1024), range(2048)),
        (range(1024), range(2048, 4096)),
        (range(1024, 2048), range(2048)),
    ]
    assert parts(scale)[1] == (range(8), range(16, 32))


# Meshes that do not fit.


@pytest.mark.parametrize(
    ("config", "rules", "sizes", "message"),
    [
        pytest.param(
            *(TINY, "tp+ep", (1, 1, 3)),
            "tp = 3 cannot split num_attention_heads 4 in o_groups 2 of rank 128 (tp can be 1, 2)",
            id="heads in three",
        ),
        pytest.param(
            *(FLASH, "tp+ep", (1, 4, 32)),
            "ep * tp = 128 cannot split num_attention_heads 64 in o_groups 8 of rank 1024"
            " (ep * tp can be 1, 2, 4, 8, 16, 32, 64)",
            id="more devices than heads",
        ),
        pytest.param(
            *(TINY, "dp-attention", (1, 3, 1)),
            "ep = 3 cannot split n_routed_experts 8 (ep can be 1, 2, 4, 8)",
            id="experts in three",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_those_that_do(config, rules, sizes, message):
    with pytest.raises(MemoryPlanError) as caught:
        check_mesh(config, mesh_of(*sizes).shape, RULES[rules])

    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "rules", "sizes"),
    [
        pytest.param(FLASH, "tp+ep", (3, 4, 8), id="flash on 96"),
        pytest.param(PRO, "tp", (1, 1, 16), id="pro on 16"),
        pytest.param(PRO, "dp-attention", (1, 4, 16), id="pro on 64"),
    ],
)
def test_a_mesh_that_divides_the_model_is_accepted(config, rules, sizes):
    assert check_mesh(config, mesh_of(*sizes).shape, RULES[rules]) is None


def test_a_mesh_takes_the_first_devices_in_the_order_of_its_axes():
    mesh = make_mesh(1, 2, 2, devices=list("abcdefgh"))

    assert dict(mesh.shape) == {"data": 1, "expert": 2, "tensor": 2}
    assert mesh.devices.tolist() == [[["a", "b"], ["c", "d"]]]


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(MemoryPlanError, match="mesh dp=2,ep=1,tp=2 needs 4 devices, found 3") as caught:
        make_mesh(2, 1, 2, devices=list("abc"))

    assert caught.value.exit_code == 2
