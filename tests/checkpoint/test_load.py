"""From files to parameters: the numbers that were stored, and one clear line for what cannot be loaded."""

import dataclasses
import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint import layouts, reading
from dsv4_jax.checkpoint.load import CheckpointWarning, LoadedModel, load
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import TINY, Config
from dsv4_jax.errors import CheckpointError, ConfigError, MemoryPlanError, NumericError
from dsv4_jax.generate import prefill
from dsv4_jax.numerics import OFFICIAL, PLAIN
from dsv4_jax.sharding import Placement, make_mesh, on_mesh, placements
from dsv4_jax.weight_files import WeightFiles
from pallas_kernels import ExpertTiles, QuantArray, Target, dequantize
from pallas_kernels.expert_mlp.rows import ExpertRows

GOLDEN = Path(__file__).parent.parent / "data"

# The last blocks of most linears are partial, and no size is another's.
ODD = dataclasses.replace(
    TINY, hidden_size=160, moe_intermediate_size=96, q_lora_rank=64, o_lora_rank=192, n_routed_experts=6
)
DSPARK = dataclasses.replace(
    TINY,
    compress_ratios=(*TINY.main_ratios, 0, 0, 0),
    dspark_block_size=2,
    dspark_noise_token_id=7,
    dspark_target_layer_ids=(2, 3, 4),
    dspark_markov_rank=32,
)

Tensors = dict[str, np.ndarray]


def read_all(folder: Path) -> Tensors:
    with WeightFiles.open(folder) as files:
        return {name: files.read(name) for name in files.tensors}


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    """A checkpoint of one shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """TINY with FP4 experts and its MTP head."""
    folder = tmp_path_factory.mktemp("load") / "tiny"
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def tensors(made_up) -> Tensors:
    return read_all(made_up)


@pytest.fixture
def changed(tmp_path, tensors) -> Callable[[Tensors], Path]:
    """A copy of `made_up` with some tensors in place of others; those that are None are left out."""

    def write_changed(changes: dict[str, np.ndarray | None], config: Config = TINY) -> Path:
        kept = {name: each for name, each in (tensors | changes).items() if each is not None}
        return write(tmp_path / "changed", config, kept)

    return write_changed


def leaves(model: LoadedModel) -> dict[str, np.ndarray]:
    found, _ = jax.tree.flatten_with_path((model.params, model.mtp_params))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same(found: LoadedModel, expected: LoadedModel) -> None:
    assert found.config == expected.config
    found_leaves, expected_leaves = leaves(found), leaves(expected)
    assert found_leaves.keys() == expected_leaves.keys()
    for path, leaf in expected_leaves.items():
        assert found_leaves[path].dtype == leaf.dtype
        assert found_leaves[path].tobytes() == leaf.tobytes(), path


# An independent reading of the files, from the formats' definitions and with numpy alone.


def decode(folder: Path) -> dict[str, np.ndarray]:
    """What each tensor stands for, float32 where it is not I64, block scales multiplied in."""
    raw = {}
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        (header_nbytes,) = struct.unpack("<Q", content[:8])
        body = content[8 + header_nbytes :]
        for name, entry in json.loads(content[8 : 8 + header_nbytes]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                raw[name] = entry["dtype"], entry["shape"], np.frombuffer(body[begin:end], np.uint8)
    decoded = {}
    for name, (dtype, shape, data) in raw.items():
        *outer, last = shape
        decoded[name] = _numbers(dtype, data).reshape(*outer, 2 * last if dtype == "I8" else last)
    for name in [name for name in decoded if name.endswith(".scale")]:
        weight = name.replace(".scale", ".weight")
        rows, columns = np.indices(decoded[weight].shape)
        block = (rows, columns // 32) if raw[weight][0] == "I8" else (rows // 128, columns // 128)
        decoded[weight] = decoded[weight] * decoded[name][block]
    return decoded


def _numbers(dtype: str, data: np.ndarray) -> np.ndarray:
    match dtype:
        case "I8":
            codes = np.stack([data % 16, data // 16], axis=-1).reshape(-1)
            magnitude = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8]
            return np.where(codes >= 8, -magnitude, magnitude)
        case "F8_E4M3":
            exponent, mantissa = (data >> 3).astype(np.float32) % 16, (data & 7).astype(np.float32)
            magnitude = np.where(exponent == 0, mantissa * 2**-9, (8 + mantissa) * 2 ** (exponent - 10))
            return np.where(data >= 128, -magnitude, magnitude)
        case "F8_E8M0":
            return 2 ** (data.astype(np.float32) - 127)
        case "BF16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F32":
            return data.view(np.float32)
        case "I64":
            return data.view(np.int64)
    raise AssertionError(dtype)


def assert_loaded_as_stored(folder: Path) -> None:
    model, stored = load(folder, mtp=True), decode(folder)
    for parameter in parameters(model.config, mtp=True):
        value = model.params | {"mtp": [model.mtp_params]}
        for key in parameter.path:
            value = value[key]
        loaded = np.asarray(dequantize(value) if isinstance(value, QuantArray) else value)
        names = [stem if stem in stored else f"{stem}.weight" for stem in parameter.stems()]
        expected = np.stack([stored[name] for name in names]) if parameter.stacked else stored[names[0]]
        np.testing.assert_array_equal(loaded.astype(expected.dtype), expected, str(parameter.path))


@pytest.mark.parametrize("name", ["tiny-fp4", "tiny-fp8"])
def test_parameters_of_a_golden_checkpoint_are_the_numbers_in_its_files(name):
    assert_loaded_as_stored(GOLDEN / name)


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8", "bf16"])
def test_parameters_with_partial_blocks_are_the_numbers_in_the_files(tmp_path, expert_dtype):
    write_checkpoint(tmp_path / "odd", dataclasses.replace(ODD, expert_dtype=expert_dtype))

    assert_loaded_as_stored(tmp_path / "odd")


def test_numbers_stay_in_the_formats_they_are_stored_in(made_up):
    params = load(made_up, mtp=True).params
    layer = params["layers"][1]

    assert layer["attn"]["wq_a"]["weight"].values.dtype == jnp.float8_e4m3fn
    assert layer["attn"]["wq_a"]["weight"].scale.dtype == jnp.uint8
    assert layer["ffn"]["experts"]["w1"].values.dtype == jnp.uint8
    assert layer["ffn"]["experts"]["w1"].values.shape == (8, 128, 64)
    assert layer["ffn"]["gate"]["tid2eid"].dtype == jnp.int32
    assert layer["attn_norm"]["weight"].dtype == jnp.bfloat16
    assert layer["attn"]["attn_sink"].dtype == jnp.float32


@pytest.mark.parametrize("mesh", [None, {"tp": 2}], ids=["one device", "a mesh"])
def test_linears_are_the_same_numbers_in_the_fp8_of_the_device(made_up, monkeypatch, mesh):
    mesh = mesh and make_mesh(**mesh)
    attn = load(made_up, mesh=mesh).params["layers"][1]["attn"]

    monkeypatch.setattr(layouts, "current_target", lambda: Target("rocm", "gfx942"))
    converted = load(made_up, mesh=mesh).params["layers"][1]["attn"]

    for name in ("wq_b", "wo_a", "wo_b"):
        here, there = attn[name]["weight"], converted[name]["weight"]
        assert there.values.dtype == jnp.float8_e4m3fnuz
        assert there.values.sharding == here.values.sharding
        assert there.scale.sharding == here.scale.sharding
        np.testing.assert_array_equal(dequantize(there), dequantize(here))


def test_a_gpu_gets_linears_of_one_input_as_one_weight_and_experts_in_tiles(made_up, monkeypatch):
    stored = load(made_up).params["layers"][1]

    monkeypatch.setattr(layouts, "current_target", lambda: Target("cuda", "sm_90"))
    laid_out = load(made_up).params["layers"][1]

    pairs = (("attn", "wq_a", "wkv"), ("ffn", "shared_experts", "w1", "w3"))
    for *outer, first, second in pairs:
        here, there = (functools.reduce(dict.__getitem__, outer, layer) for layer in (stored, laid_out))
        both = [dequantize(here[name]["weight"]) for name in (first, second)]
        assert there[second]["weight"] is None
        np.testing.assert_array_equal(dequantize(there[first]["weight"]), jnp.concatenate(both))
    experts = laid_out["ffn"]["experts"]
    assert isinstance(experts["w1"], ExpertTiles)
    assert isinstance(experts["w2"], ExpertTiles)
    assert experts["w3"] is None


def test_a_gpu_gets_fp8_experts_as_rows_too(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "base", dataclasses.replace(TINY, expert_dtype="fp8"))
    monkeypatch.setattr(layouts, "current_target", lambda: Target("cuda", "sm_90"))

    experts = load(tmp_path / "base").params["layers"][0]["ffn"]["experts"]

    assert isinstance(experts["w1"], ExpertRows)
    assert isinstance(experts["w2"], ExpertRows)
    assert experts["w3"] is None


def test_the_model_gives_the_same_on_parameters_laid_out_for_a_gpu(wide, monkeypatch):
    stored = load(wide)
    monkeypatch.setattr(layouts, "current_target", lambda: Target("cuda", "sm_90"))
    laid_out = load(wide)
    monkeypatch.undo()
    ids, zero, length = jnp.arange(7)[None], jnp.zeros(1, jnp.int32), jnp.full(1, 7)

    def logits(model):
        cache = make_cache(model.config, OFFICIAL, batch=1, max_len=8)
        return prefill(model.config, OFFICIAL, model.params, ids, zero, length, cache)[0]

    np.testing.assert_array_equal(logits(laid_out), logits(stored))


def test_every_byte_of_an_e8m0_scale_is_an_exponent_and_never_a_number(changed, tensors):
    name = "layers.0.ffn.experts.3.w1.scale"
    codes = np.arange(tensors[name].size, dtype=np.uint8).reshape(tensors[name].shape)  # all but NaN's in 512
    folder = changed({name: codes.view(ml_dtypes.float8_e8m0fnu)})

    scale = load(folder).params["layers"][0]["ffn"]["experts"]["w1"].scale

    np.testing.assert_array_equal(scale[3], codes)


def test_large_tensors_read_in_pieces_are_the_same(made_up, monkeypatch):
    whole = load(made_up, mtp=True)

    monkeypatch.setattr(reading, "READ_AT_ONCE", 1000)

    assert_same(load(made_up, mtp=True), whole)
    assert_spread(load(made_up, mtp=True, mesh=make_mesh(tp=2)), whole)


def test_parameters_are_the_same_if_only_one_array_fits_the_read_ahead(made_up, monkeypatch):
    whole = load(made_up, mtp=True)

    monkeypatch.setattr(reading, "READ_AHEAD", 1)

    assert_same(load(made_up, mtp=True), whole)


# Meshes.


def assert_spread(spread: LoadedModel, whole: LoadedModel) -> None:
    """Every device has what its rules say of each array, and zeros where it has room for more."""
    for parameter in parameters(spread.config, mtp=True):
        there, here = (
            functools.reduce(lambda tree, key: tree[key], parameter.path, tree)
            for tree in (both(spread), both(whole))
        )
        places = placements(spread.config, spread.mesh, spread.rules, parameter.axes, parameter.value)
        places = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
        for found, expected, place in zip(jax.tree.leaves(there), jax.tree.leaves(here), places, strict=True):
            assert found.sharding == place.sharding, parameter.path
            stored = np.asarray(expected)
            for shard in found.addressable_shards:
                own = np.asarray(shard.data).copy()
                wanted = stored[tuple(slice(each.start, each.stop) for each in place.source(shard.index))]
                filled = tuple(slice(size) for size in wanted.shape)
                assert own[filled].tobytes() == wanted.tobytes(), parameter.path
                own[filled] = np.zeros((), own.dtype)
                assert not own.view(np.uint8).any(), parameter.path


def both(model: LoadedModel) -> dict:
    return model.params | {"mtp": [model.mtp_params]}


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        pytest.param({"tp": 2}, "tp+ep", id="tensors in two, three blocks of experts"),
        pytest.param({"tp": 8}, "tp", id="groups of heads and experts more finely than they divide"),
        pytest.param({"ep": 8}, "ep", id="experts in eight"),
        pytest.param({"ep": 4, "tp": 2}, "dp-attention", id="a batch and experts in four"),
        pytest.param({"dp": 2, "ep": 2, "tp": 2}, "context", id="two copies"),
    ],
)
def test_each_device_of_a_mesh_has_its_part_and_each_byte_is_read_once(wide, sizes, rules, monkeypatch):
    whole = load(wide, mtp=True)
    times_read = {name: np.zeros(each.shape[0], int) for name, each in read_all(wide).items()}
    read = WeightFiles.read

    def counted(files, name, start=0, count=None, out=None):
        rows = read(files, name, start, count, out)
        times_read[name][start : start + len(rows)] += 1
        return rows

    monkeypatch.setattr(WeightFiles, "read", counted)
    spread = load(wide, mtp=True, mesh=make_mesh(**sizes), rules=rules, verify="values")

    assert_spread(spread, whole)
    assert all((times == 1).all() for times in times_read.values())
    with WeightFiles.open(wide) as files:
        assert spread.nbytes_read == whole.nbytes_read == files.nbytes


def test_a_mesh_of_gpus_lays_out_each_devices_parts(wide, monkeypatch):
    monkeypatch.setattr(layouts, "current_target", lambda: Target("cuda", "sm_90"))
    mesh, ids = make_mesh(ep=2, tp=2), jnp.arange(7)[None]

    def logits(model: LoadedModel) -> np.ndarray:
        with on_mesh(model.mesh, model.rules):
            cache = make_cache(model.config, PLAIN, batch=1, max_len=8)
            arguments = ids, jnp.zeros(1, jnp.int32), jnp.full(1, 7), cache
            return np.asarray(prefill(model.config, PLAIN, model.params, *arguments)[0])

    laid_out = load(wide, mesh=mesh)
    experts = laid_out.params["layers"][1]["ffn"]["experts"]
    attn = laid_out.params["layers"][1]["attn"]

    assert isinstance(experts["w1"], ExpertTiles)
    assert experts["w3"] is None
    # Eight of sixteen experts, 64 rows a tile; of gate and up together twice two of three blocks of 128, the
    # fourth one empty.
    assert experts["w1"].tiles.sharding.shard_shape(experts["w1"].tiles.shape)[:3] == (8, 8, 1)
    assert experts["w2"].tiles.sharding.shard_shape(experts["w2"].tiles.shape)[:3] == (8, 2, 2)
    assert attn["wkv"]["weight"] is None
    monkeypatch.undo()
    np.testing.assert_allclose(logits(laid_out), logits(load(wide)), rtol=0, atol=1e-5)


def test_a_mesh_that_does_not_divide_the_model_is_refused(made_up):
    with pytest.raises(MemoryPlanError, match="tp = 4 cannot split num_attention_heads 4") as caught:
        load(made_up, mesh=make_mesh(tp=4))

    assert caught.value.exit_code == 2


def test_rules_that_do_not_exist_are_refused_with_those_that_do(made_up):
    with pytest.raises(MemoryPlanError, match=r"'pp'.*have tp\+ep, tp, ep, dp-attention, context") as caught:
        load(made_up, mesh=make_mesh(tp=2), rules="pp")

    assert caught.value.exit_code == 2


# What a checkpoint may leave open.


def test_a_linear_stored_as_bf16_without_a_scale_is_loaded_unquantised(changed, tensors):
    weight = np.random.default_rng(0).normal(size=(128, 128)).astype(ml_dtypes.bfloat16)
    folder = changed({"layers.2.attn.wq_a.weight": weight, "layers.2.attn.wq_a.scale": None})

    loaded = load(folder, strict=True).params["layers"][2]["attn"]["wq_a"]["weight"]

    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(loaded), weight)


def test_scales_may_be_float32_beside_fp4_experts(tmp_path):
    write_checkpoint(tmp_path / "base", TINY, scale_dtype="F32")

    assert load(tmp_path / "base").params["layers"][0]["ffn"]["experts"]["w1"].scale.dtype == jnp.float32
    assert_loaded_as_stored(tmp_path / "base")


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8", "bf16"])
def test_an_expert_dtype_that_config_json_lacks_is_told_by_the_tensors(tmp_path, expert_dtype):
    config = dataclasses.replace(TINY, expert_dtype=expert_dtype)
    write_checkpoint(tmp_path / "first-upload", config)
    path = tmp_path / "first-upload" / "config.json"
    raw = json.loads(path.read_text())
    del raw["expert_dtype"]
    path.write_text(json.dumps(raw))

    assert load(path.parent).config == config


def test_an_unknown_expert_dtype_is_refused(made_up, tmp_path, tensors):
    folder = write(tmp_path / "int4", TINY, tensors)
    raw = TINY.to_dict() | {"expert_dtype": "int4"}
    (folder / "config.json").write_text(json.dumps(raw))

    with pytest.raises(ConfigError, match="expert_dtype is 'int4', want 'fp4' or 'fp8'"):
        load(folder)


def test_the_wrong_expert_dtype_is_told_by_both_dtypes(changed):
    folder = changed({}, dataclasses.replace(TINY, expert_dtype="fp8"))

    assert refusal(folder).message.endswith(
        "layers.0.ffn.experts.0.w1.weight is I8 [128, 64], expected F8_E4M3 [128, 128]"
    )


def test_a_dspark_checkpoint_loads_without_its_draft(tmp_path, recwarn):
    write_checkpoint(tmp_path / "dspark", DSPARK)

    model = load(tmp_path / "dspark", strict=True)

    assert model.mtp_params is None
    assert len(model.params["layers"]) == 5
    assert not recwarn


def test_asking_a_dspark_checkpoint_for_mtp_says_what_it_holds(tmp_path):
    write_checkpoint(tmp_path / "dspark", DSPARK)

    error = refusal(tmp_path / "dspark", mtp=True)

    assert error.message == f"{tmp_path / 'dspark'}: holds a DSpark draft and no MTP head"
    assert "load it without MTP" in error.hint


def test_a_checkpoint_without_its_mtp_head_loads_until_it_is_asked_for(tmp_path):
    write_checkpoint(tmp_path / "main", TINY, mtp=False)

    assert load(tmp_path / "main", strict=True).mtp_params is None
    assert refusal(tmp_path / "main", mtp=True).message.endswith("holds no MTP weights (mtp.0.*)")


def test_copies_of_the_embedding_are_ignored_and_are_no_mtp_head(tmp_path, tensors):
    copies = {
        "mtp.0.emb.tok_emb.weight": tensors["embed.weight"],
        "mtp.0.head.weight": tensors["head.weight"],
    }
    main = {name: each for name, each in tensors.items() if not name.startswith("mtp.")}
    folder = write(tmp_path / "copies", TINY, main | copies)

    assert load(folder, strict=True).mtp_params is None
    assert "holds no MTP weights" in refusal(folder, mtp=True).message


def test_a_head_that_is_not_asked_for_is_not_loaded(made_up, recwarn):
    assert load(made_up, strict=True).mtp_params is None
    assert not recwarn


# What cannot be loaded.


def refusal(folder: Path, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    assert caught.value.exit_code == 65
    assert str(folder) in caught.value.message
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        load(tmp_path / "absent")

    assert caught.value.exit_code == 66


def test_missing_tensors_are_named(changed):
    absent = ["layers.1.attn_norm.weight", "layers.2.ffn.experts.5.w2.weight", "layers.3.attn.wkv.scale"]
    folder = changed(dict.fromkeys(absent))

    error = refusal(folder)

    assert error.message.endswith(f"lacks {', '.join(absent)}")
    assert "download" in error.hint


def test_a_long_list_of_missing_tensors_is_cut_short(changed, tensors):
    error = refusal(changed({name: None for name in tensors if name.startswith("layers.1.")}))

    assert "and 85 more tensors" in error.message
    assert len(error.message) < 300


def test_a_missing_tensor_of_the_mtp_head_matters_only_when_it_is_asked_for(changed):
    folder = changed({"mtp.0.enorm.weight": None})

    load(folder, strict=True)
    assert refusal(folder, mtp=True).message.endswith("lacks mtp.0.enorm.weight")


def test_unexpected_tensors_are_a_warning_and_with_strict_an_error(changed):
    folder = changed({"layers.9.attn_norm.weight": np.zeros(128, np.float32)})

    with pytest.warns(CheckpointWarning, match=r"layers\.9\.attn_norm\.weight ignored") as caught:
        load(folder)
    assert caught[0].filename == __file__
    assert (
        "layers.9.attn_norm.weight, which the model has no place for" in refusal(folder, strict=True).message
    )


def test_mtp_tensors_of_a_config_without_mtp_are_unexpected(changed):
    config = dataclasses.replace(TINY, num_nextn_predict_layers=0, compress_ratios=TINY.main_ratios)

    with pytest.warns(CheckpointWarning, match=r"mtp\.0\..* more tensors ignored"):
        load(changed({}, config))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.0.attn.wq_a.weight", np.zeros((128, 64), ml_dtypes.float8_e4m3fn), "F8_E4M3 [128, 64]"),
        ("layers.0.attn.wq_a.weight", np.zeros((128, 128), ml_dtypes.float8_e5m2), "F8_E5M2 [128, 128]"),
        ("layers.0.attn.wq_a.weight", np.zeros((128, 128), ml_dtypes.bfloat16), "BF16 [128, 128]"),
        ("layers.0.attn.wq_a.scale", np.zeros((1, 2), ml_dtypes.float8_e8m0fnu), "F8_E8M0 [1, 2]"),
        ("layers.0.attn.wq_a.scale", np.zeros((1, 1), np.uint8), "U8 [1, 1]"),
        ("layers.0.ffn.experts.7.w3.weight", np.zeros((128, 64), np.uint8), "U8 [128, 64]"),
        ("layers.0.ffn.experts.7.w3.scale", np.ones((128, 4), np.float32), "F32 [128, 4]"),
        ("norm.weight", np.ones(128, np.float32), "F32 [128]"),
        ("layers.0.attn.attn_sink", np.ones((4, 1), np.float32), "F32 [4, 1]"),
        ("layers.0.ffn.gate.tid2eid", np.zeros((512, 2), np.int32), "I32 [512, 2]"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_told_beside_the_one_needed(
    changed, tensors, name, value, message
):
    error = refusal(changed({name: value}))

    assert f"{name} is {message}, expected " in error.message
    assert str(list(tensors[name].shape)) in error.message
    assert "config.json" in error.hint


def test_one_expert_in_another_format_than_the_rest_is_refused(changed):
    stem = "layers.0.ffn.experts.2.w2"
    folder = changed({f"{stem}.weight": np.zeros((128, 128), ml_dtypes.bfloat16), f"{stem}.scale": None})

    assert f"{stem}.weight is BF16 [128, 128], expected I8 [128, 64]" in refusal(folder).message


@pytest.mark.parametrize(
    ("place", "expert", "named"), [(0, 8, "0 to 8"), (511, -1, "-1 to 7"), (300, 2**40, "0 to 1099511627776")]
)
def test_a_hash_table_that_names_an_expert_the_model_lacks_is_refused(changed, tensors, place, expert, named):
    table = tensors["layers.1.ffn.gate.tid2eid"].copy()
    table[0], table[1] = 0, 7
    table[place, 1] = expert

    error = refusal(changed({"layers.1.ffn.gate.tid2eid": table}))

    assert f"layers.1.ffn.gate.tid2eid names experts {named}, the model has 8" in error.message


def with_one(array: np.ndarray, code: int) -> np.ndarray:
    """A copy whose last value has these bits."""
    changed = array.copy()
    changed.view(f"u{array.itemsize}")[(-1,) * array.ndim] = code
    return changed


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("layers.0.ffn.experts.7.w3.scale", 0xFF),
        ("layers.0.attn.wq_a.scale", 0xFF),
        ("layers.0.attn.wo_b.weight", 0x7F),
        ("layers.0.attn.wo_b.weight", 0xFF),
        ("layers.0.attn_norm.weight", 0x7FC0),
        ("embed.weight", 0xFF80),
        ("layers.4.ffn.gate.bias", 0x7F800000),
        ("mtp.0.hc_head_fn", 0x7FC00001),
    ],
)
def test_numbers_that_are_not_finite_are_found_when_values_are_verified(changed, tensors, name, code):
    folder = changed({name: with_one(tensors[name], code)})

    load(folder, mtp=True)
    with pytest.raises(NumericError, match=f"{name} holds values that are not finite numbers") as caught:
        load(folder, mtp=True, verify="values")
    assert caught.value.exit_code == 70


@pytest.mark.parametrize("code", [0x7FC00000, 0x7F800000], ids=["NaN", "infinity"])
def test_float32_scales_that_are_not_finite_are_found_when_values_are_verified(tmp_path, code):
    write_checkpoint(tmp_path / "base", TINY, scale_dtype="F32")
    tensors, name = read_all(tmp_path / "base"), "layers.0.ffn.experts.7.w3.scale"
    folder = write(tmp_path / "spoilt", TINY, tensors | {name: with_one(tensors[name], code)})

    with pytest.raises(NumericError, match=f"{name} holds values that are not finite numbers"):
        load(folder, verify="values")


def test_the_largest_numbers_of_every_format_pass_as_finite(changed, tensors):
    largest = {
        "layers.0.ffn.experts.7.w3.scale": 0xFE,
        "layers.0.ffn.experts.7.w3.weight": 0x7F,
        "layers.0.attn.wo_b.weight": 0x7E,
        "norm.weight": 0x7F7F,
        "layers.4.ffn.gate.bias": 0xFF7FFFFF,
    }

    load(changed({name: with_one(tensors[name], code) for name, code in largest.items()}), verify="values")


def test_progress_goes_to_stderr_and_ends_at_all_bytes(made_up, capsys, monkeypatch):
    monkeypatch.setattr(reading, "READ_AT_ONCE", 10_000)

    load(made_up, mesh=make_mesh(tp=2), progress=True)

    captured = capsys.readouterr()
    assert not captured.out
    assert "loading" in captured.err
    done, total = captured.err.split()[-4].split("/")
    assert done == total
