"""Made-up checkpoints: the official layout to the byte, numbers a model can run on, all or nothing."""

import dataclasses
import errno
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint import synthetic
from dsv4_jax.checkpoint.inspect import inspect_checkpoint
from dsv4_jax.checkpoint.load import load
from dsv4_jax.checkpoint.names import expected_tensors
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import TINY, Config
from dsv4_jax.errors import OutputError
from dsv4_jax.model import bind
from dsv4_jax.numerics import PLAIN
from dsv4_jax.weight_files import INDEX_NAME, WeightFiles
from pallas_kernels import dequantize

FP8 = dataclasses.replace(TINY, expert_dtype="fp8")
BF16 = dataclasses.replace(TINY, expert_dtype="bf16")
DSPARK = dataclasses.replace(
    TINY,
    compress_ratios=(*TINY.main_ratios, 0, 0, 0),
    dspark_block_size=2,
    dspark_noise_token_id=7,
    dspark_target_layer_ids=(2, 3, 4),
    dspark_markov_rank=32,
)
CONFIGS = {"fp4": TINY, "fp8": FP8, "bf16": BF16, "dspark": DSPARK}


def contents(folder: Path) -> dict[str, bytes]:
    with WeightFiles.open(folder) as files:
        return {name: files.read(name).tobytes() for name in files.tensors}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    write_checkpoint(folder, TINY)
    return folder


# Layout.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_tensor_of_the_schema_is_there_and_no_other(tmp_path, config):
    write_checkpoint(tmp_path / "made-up", config)

    with WeightFiles.open(tmp_path / "made-up") as files:
        found = {name: (info.dtype, info.shape) for name, info in files.tensors.items()}
    assert found == expected_tensors(config, mtp=True)
    assert inspect_checkpoint(tmp_path / "made-up").ok


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_loads_without_a_warning_and_all_its_numbers_are_finite(tmp_path, config, recwarn):
    write_checkpoint(tmp_path / "made-up", config)

    model = load(tmp_path / "made-up", mtp=config.draft == "mtp", verify="values", strict=True)

    assert model.config == config
    assert not recwarn


@pytest.mark.parametrize("shards", range(1, 8))
def test_any_number_of_shards_holds_the_same_tensors(tiny, tmp_path, shards):
    folder = tmp_path / "made-up"
    write_checkpoint(folder, TINY, shards=shards)

    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    index = json.loads((folder / INDEX_NAME).read_text())
    found = contents(folder)
    assert sorted(sizes) == [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    assert max(sizes.values()) < 1.2 * min(sizes.values())
    assert set(index["weight_map"].values()) == set(sizes)
    assert index["metadata"]["total_size"] == sum(map(len, found.values()))
    assert found == contents(tiny)


def test_there_cannot_be_more_shards_than_tensors(tmp_path):
    with pytest.raises(ValueError, match="508 tensors cannot fill 509 shards"):
        write_checkpoint(tmp_path / "made-up", TINY, shards=509)
    write_checkpoint(tmp_path / "made-up", TINY, shards=508)

    assert inspect_checkpoint(tmp_path / "made-up").shards == 508


def test_config_and_generation_config_are_as_released(tiny):
    assert Config.from_pretrained(tiny) == TINY
    generation = json.loads((tiny / "generation_config.json").read_text())
    wanted = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "bos_token_id": 0, "eos_token_id": 1}
    assert wanted.items() <= generation.items()


def test_without_mtp_only_the_main_model_is_written(tmp_path):
    write_checkpoint(tmp_path / "made-up", DSPARK, mtp=False)

    assert contents(tmp_path / "made-up").keys() == expected_tensors(TINY, mtp=False).keys()


def test_copies_repeat_the_embedding_and_the_head(tiny, tmp_path):
    write_checkpoint(tmp_path / "made-up", TINY, mtp_copies=True)

    found = contents(tmp_path / "made-up")
    assert found.pop("mtp.0.emb.tok_emb.weight") == found["embed.weight"]
    assert found.pop("mtp.0.head.weight") == found["head.weight"]
    assert found == contents(tiny)
    assert load(tmp_path / "made-up", mtp=True, strict=True).mtp_params is not None


def test_linears_may_be_stored_unquantised(tmp_path):
    experts = [f"layers.3.ffn.experts.{expert}.w2" for expert in range(TINY.n_routed_experts)]
    write_checkpoint(tmp_path / "made-up", TINY, unquantised=["layers.1.attn.wo_b", *experts])

    layers = load(tmp_path / "made-up", strict=True).params["layers"]

    assert layers[1]["attn"]["wo_b"]["weight"].dtype == jnp.bfloat16
    assert layers[1]["attn"]["wo_b"]["weight"].shape == (128, 256)
    assert layers[3]["ffn"]["experts"]["w2"].dtype == jnp.bfloat16
    assert layers[3]["ffn"]["experts"]["w2"].shape == (8, 128, 128)


@pytest.mark.parametrize("stem", ["layers.1.attn.wq_z", "layers.1.attn_norm", "layers.1.attn.wq_a.weight"])
def test_what_is_not_a_quantised_linear_cannot_be_unquantised(tmp_path, stem):
    with pytest.raises(ValueError, match=f"'{stem}' is not a quantised linear of this config"):
        write_checkpoint(tmp_path / "made-up", TINY, unquantised=[stem])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale_dtype", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("config", [TINY, FP8], ids=["fp4", "fp8"])
def test_scales_may_have_either_dtype(tmp_path, config, scale_dtype):
    write_checkpoint(tmp_path / "made-up", config, scale_dtype=scale_dtype)

    report = inspect_checkpoint(tmp_path / "made-up")
    assert report.ok
    assert report.scale_dtype == scale_dtype


# Numbers.


def test_a_tensor_depends_on_the_seed_and_its_name_alone(tiny, tmp_path):
    write_checkpoint(tmp_path / "again", TINY, mtp=False, shards=2)
    write_checkpoint(tmp_path / "other", TINY, seed=1)

    first, again, other = contents(tiny), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert again.items() <= first.items()
    # Of the block scales some are a single byte, which may well be the same.
    assert all(first[name] != other[name] for name in first if not name.endswith(".scale"))
    assert len(set(first.values())) > 0.8 * len(first)


@pytest.mark.parametrize("config", [TINY, FP8, BF16], ids=["fp4", "fp8", "bf16"])
def test_linears_keep_numbers_of_size_1_at_size_1(tmp_path, config):
    wide = dataclasses.replace(config, hidden_size=1024, num_hidden_layers=2, compress_ratios=(4, 0, 0))
    write_checkpoint(tmp_path / "made-up", wide)
    params = load(tmp_path / "made-up").params
    layer = params["layers"][0]
    linears = {
        "wq_a": dequantize(layer["attn"]["wq_a"]["weight"]),
        "wo_b": dequantize(layer["attn"]["wo_b"]["weight"]),
        "w1": layer["ffn"]["experts"]["w1"] if config is BF16 else dequantize(layer["ffn"]["experts"]["w1"]),
        "gate": layer["ffn"]["gate"]["weight"],
        "wgate": layer["attn"]["compressor"]["wgate"]["weight"],
        "head": params["head"]["weight"],
        "hc": layer["hc_attn"]["fn"],
    }

    for name, weight in linears.items():
        gain = np.sqrt(np.mean(np.square(np.float32(weight))) * weight.shape[-1])
        assert 0.7 < gain < 1.4, name
        assert abs(np.mean(np.float32(weight))) < 0.2 / np.sqrt(weight.shape[-1]), name
    norm = np.float32(layer["attn_norm"]["weight"])
    assert 0.6 < norm.min() < norm.max() < 1.4
    assert np.std(np.float32(params["embed"]["weight"])) == pytest.approx(1, rel=0.05)


def test_block_scales_differ_and_those_of_base_are_no_powers_of_two(tmp_path):
    write_checkpoint(tmp_path / "fp4", TINY)
    write_checkpoint(tmp_path / "fp8", dataclasses.replace(FP8, hidden_size=512))

    exponents = np.asarray(load(tmp_path / "fp4").params["layers"][0]["ffn"]["experts"]["w1"].scale)
    scales = np.asarray(load(tmp_path / "fp8").params["layers"][0]["ffn"]["experts"]["w1"].scale)
    fraction, _ = np.frexp(scales)
    assert len(np.unique(exponents)) == 3
    assert scales.max() > 2 * scales.min()
    assert np.mean(fraction != 0.5) > 0.9


def test_hash_tables_name_distinct_experts_for_each_token(tiny):
    with WeightFiles.open(tiny) as files:
        table = files.read("layers.1.ffn.gate.tid2eid")

    assert (table.dtype, table.shape) == (np.int64, (512, 2))
    assert (table[:, 0] != table[:, 1]).all()
    assert set(np.unique(table)) == set(range(8))


@pytest.mark.slow
def test_activations_stay_in_range_through_tens_of_layers(tmp_path):
    deep = dataclasses.replace(
        TINY, num_hidden_layers=24, compress_ratios=(0, 0, *(4, 128) * 11, 0), num_hash_layers=0
    )
    write_checkpoint(tmp_path / "made-up", deep)
    model = bind(deep, PLAIN, load(tmp_path / "made-up").params)
    cache = make_cache(deep, PLAIN, batch=1, max_len=256)
    ids = jnp.arange(130)[None] * 7 % deep.vocab_size

    # Not under one jit: then each kind of layer is compiled once.
    streams, _ = model(ids, jnp.zeros(1, jnp.int32), jnp.full(1, ids.shape[1], jnp.int32), cache)
    logits = model.logits(streams)

    assert 1 < np.std(np.float32(streams)) < 20
    assert 0.5 < np.std(np.asarray(logits)) < 2
    assert len(np.unique(np.argmax(logits, -1))) > 40  # not one token for all


# All or nothing.


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")

    with pytest.raises(OutputError, match="is not empty") as caught:
        write_checkpoint(tmp_path, TINY)

    assert caught.value.exit_code == 73
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_file_is_not_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(OutputError, match="is a file"):
        write_checkpoint(tmp_path / "file", TINY)
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        write_checkpoint(tmp_path / "file" / "below", TINY)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_an_absent_parent_will_do(tmp_path):
    (tmp_path / "empty").mkdir()

    write_checkpoint(tmp_path / "empty", TINY)
    write_checkpoint(tmp_path / "absent" / "deeper", TINY)

    assert contents(tmp_path / "empty") == contents(tmp_path / "absent" / "deeper")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "absent"}
    assert [path.name for path in (tmp_path / "absent").iterdir()] == ["deeper"]


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (synthetic.SafetensorError("I/O error: No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "disk full inside safetensors", "Ctrl-C"],
)
def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch, failure, raised):
    save_file, written = synthetic.save_file, []

    def fails_at_the_second(tensors, path, metadata):
        if written:
            raise failure
        save_file(tensors, path, metadata)
        written.append(path)

    monkeypatch.setattr(synthetic, "save_file", fails_at_the_second)
    with pytest.raises(raised) as caught:
        write_checkpoint(tmp_path / "made-up", TINY)

    if raised is OutputError:
        assert "made-up: cannot be written: " in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert len(written) == 1
    assert not list(tmp_path.iterdir())


def test_progress_goes_to_stderr(tmp_path, capsys):
    write_checkpoint(tmp_path / "made-up", TINY, progress=True)

    captured = capsys.readouterr()
    assert not captured.out
    assert "writing" in captured.err
