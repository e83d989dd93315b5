"""The model spread over devices, eight made-up ones on a CPU: same logits, same tokens."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import FLASH, FLASH_BASE, PRO, PRO_BASE, TINY
from dsv4_jax.decode import Requests
from dsv4_jax.errors import MemoryPlanError
from dsv4_jax.generate import decode_step, generate, prefill
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from dsv4_jax.sharding import (
    MESH_AXES,
    RULES,
    check_mesh,
    constrain,
    make_mesh,
    named_sharding,
    parameter_sharding,
    spec,
)
from pallas_kernels import QuantArray

FOLDER = Path(__file__).parents[1] / "data" / "tiny-fp4"
CLOSE = 1e-4  # in logits of size 8, sums of which a mesh adds up in another order
STEPS, MAX_LEN = 6, 64
LENGTH = np.array([19, 7], np.int32)
IDS = np.random.default_rng(0).integers(2, TINY.vocab_size, (2, LENGTH.max()), dtype=np.int32)

several_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


def greedy_logits(loaded: LoadedModel) -> np.ndarray:
    """Logits after the prompts, then after each greedy token: [step, row, vocab]."""
    model = loaded.config, PLAIN, loaded.params
    cache = make_cache(loaded.config, PLAIN, batch=2, max_len=MAX_LEN)
    logits, cache = prefill(*model, IDS, np.zeros_like(LENGTH), LENGTH, cache)
    rows = [np.asarray(logits)]
    for step in range(STEPS - 1):
        token = rows[-1].argmax(-1).astype(np.int32)
        logits, cache = decode_step(*model, token, LENGTH + step, cache)
        rows.append(np.asarray(logits))
    return np.stack(rows)


@pytest.fixture(scope="module")
def on_one_device(tiny_fp4, shallow) -> np.ndarray:
    return greedy_logits(shallow(tiny_fp4.loaded))


@several_devices
@pytest.mark.parametrize(
    ("dp", "ep", "tp"),
    [
        pytest.param(1, 1, 1, id="a mesh of one"),
        pytest.param(1, 1, 2, id="tensors in two"),
        pytest.param(1, 2, 1, id="experts in two"),
        pytest.param(1, 2, 2, id="experts and tensors in two"),
        pytest.param(2, 1, 2, id="batch and tensors in two"),
    ],
)
def test_a_mesh_gives_the_logits_and_greedy_tokens_of_one_device(dp, ep, tp, shallow, on_one_device):
    mesh = make_mesh(dp, ep, tp)
    loaded = shallow(load(FOLDER, mesh=mesh))

    with jax.set_mesh(mesh):
        logits = greedy_logits(loaded)

    np.testing.assert_allclose(logits, on_one_device, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(logits.argmax(-1), on_one_device.argmax(-1))


@several_devices
def test_the_whole_token_loop_runs_on_a_mesh(shallow, on_one_device):
    mesh = make_mesh(ep=2, tp=2)
    loaded = shallow(load(FOLDER, mesh=mesh))
    model = loaded.config, PLAIN, loaded.params
    greedy = SamplingArrays.stack([SamplingParams(temperature=0.0)] * 2)
    limits = np.full(2, STEPS, np.int32), np.zeros(2, bool)

    with jax.set_mesh(mesh):
        requests = Requests(greedy, *limits)
        written = generate(*model, IDS, LENGTH, requests, max_new=STEPS, max_len=MAX_LEN)

    np.testing.assert_array_equal(np.asarray(written.tokens).T, on_one_device.argmax(-1))


@several_devices
def test_each_device_holds_its_share_of_the_parameters(tiny_fp4):
    mesh = make_mesh(ep=2, tp=2)

    spread = load(FOLDER, mtp=True, mesh=mesh)

    whole = tiny_fp4.loaded
    for parameter in parameters(spread.config, mtp=True):
        tree, expected = (spread.params, whole.params)
        path = parameter.path
        if path[0] == "mtp":
            tree, expected, path = spread.mtp_params, whole.mtp_params, path[2:]
        for key in path:
            tree, expected = tree[key], expected[key]
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == parameter_sharding(
            mesh, parameter.axes, tree
        )
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    experts = spread.params["layers"][1]["ffn"]["experts"]
    assert {each.data.shape for each in experts["w1"].values.addressable_shards} == {(4, 64, 64)}  # packed
    assert {each.data.shape for each in experts["w2"].values.addressable_shards} == {(4, 128, 32)}
    assert spread.mesh == mesh


# Rules.


def test_a_spec_follows_the_rules():
    assert spec("experts", "expert_hidden", "hidden") == PartitionSpec("expert", "tensor", None)
    assert spec("vocab", None) == PartitionSpec(("expert", "tensor"), None)
    assert spec("heads", rules={**RULES, "heads": None}) == PartitionSpec(None)


@pytest.mark.parametrize(
    "axes",
    [("heads", "expert_hidden"), ("vocab", "heads"), ("experts", "vocab")],
    ids=["one axis twice", "an axis within a pair", "a pair after an axis"],
)
def test_two_dimensions_on_one_mesh_axis_are_refused_by_name(axes):
    with pytest.raises(ValueError, match=f"'{axes[0]}', '{axes[1]}'.* two dimensions over one mesh axis"):
        spec(*axes)


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="wings"):
        spec("batch", "wings")


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = AbstractMesh((1, 2, 2), MESH_AXES)

    scale = named_sharding(mesh, ("experts", "expert_hidden", "hidden"), (4, 1, 3))

    assert scale.spec == PartitionSpec("expert", None, None)


def test_without_a_mesh_constraints_do_nothing():
    x = jnp.ones((2, 3))

    assert constrain(x, "batch", "hidden") is x


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FLASH, id="flash"),
        pytest.param(FLASH_BASE, id="flash-base"),
        pytest.param(PRO, id="pro"),
        pytest.param(PRO_BASE, id="pro-base"),
        pytest.param(TINY, id="tiny"),
    ],
)
def test_every_parameter_of_the_models_splits_as_its_axes_say(config):
    mesh = AbstractMesh((2, 2, 2), MESH_AXES)

    for parameter in parameters(config, mtp=True):
        value, axes = parameter.value, parameter.axes
        sharding = parameter_sharding(mesh, axes, value)

        assert len(axes) == value.ndim, parameter.path
        values, split = (
            (value.values, sharding.values) if isinstance(value, QuantArray) else (value, sharding)
        )
        assert split == NamedSharding(mesh, spec(*axes)), parameter.path  # no dimension was left whole
        assert split.shard_shape(values.shape)  # raises where a dimension does not divide
        for leaf, its in zip(jax.tree.leaves(value), jax.tree.leaves(sharding), strict=True):
            assert its.shard_shape(leaf.shape)


# Meshes that do not fit.


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        pytest.param(
            TINY,
            {"tensor": 3},
            "tp=3 does not divide num_attention_heads 4, o_groups 2, moe_intermediate_size 128"
            " (tp can be 1, 2)",
            id="tensors in three",
        ),
        pytest.param(
            TINY, {"tensor": 4}, "tp=4 does not divide o_groups 2 (tp can be 1, 2)", id="more than groups"
        ),
        pytest.param(
            TINY,
            {"expert": 3},
            "ep=3 does not divide n_routed_experts 8 (ep can be 1, 2, 4, 8)",
            id="experts in three",
        ),
        pytest.param(
            FLASH,
            {"tensor": 16},
            "tp=16 does not divide o_groups 8 (tp can be 1, 2, 4, 8)",
            id="flash in sixteen",
        ),
        pytest.param(
            FLASH,
            {"tensor": 8, "expert": 256},
            "tp * ep = 2048 does not divide vocab_size 129280 (choose tp * ep to divide it)",
            id="too fine for the vocabulary",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_those_that_do(config, shape, message):
    with pytest.raises(MemoryPlanError) as caught:
        check_mesh(config, shape)

    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        pytest.param(FLASH, {"data": 3, "expert": 8, "tensor": 8}, id="flash on 192"),
        pytest.param(PRO, {"data": 1, "expert": 4, "tensor": 16}, id="pro on 64"),
        pytest.param(TINY, {}, id="no mesh"),
    ],
)
def test_a_mesh_that_divides_the_model_is_accepted(config, shape):
    assert check_mesh(config, shape) is None


@several_devices
def test_loading_refuses_a_mesh_before_it_reads():
    with pytest.raises(MemoryPlanError, match="tp=3 does not divide"):
        load(FOLDER, mesh=make_mesh(tp=3))


def test_a_mesh_takes_the_first_devices_in_the_order_of_its_axes():
    mesh = make_mesh(1, 2, 2, devices=list("abcdefgh"))

    assert dict(mesh.shape) == {"data": 1, "expert": 2, "tensor": 2}
    assert mesh.devices.tolist() == [[["a", "b"], ["c", "d"]]]


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(MemoryPlanError, match="mesh dp=2,ep=1,tp=2 needs 4 devices, found 3") as caught:
        make_mesh(2, 1, 2, devices=list("abc"))

    assert caught.value.exit_code == 2
