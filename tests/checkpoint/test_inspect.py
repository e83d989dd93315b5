"""What inspection says of a folder: what it holds, and whether that is what its config needs."""

import dataclasses
import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv4_jax.checkpoint.inspect import inspect_checkpoint
from dsv4_jax.checkpoint.names import expected_tensors
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import FLASH, TINY, Config
from dsv4_jax.errors import CheckpointError, ConfigError
from dsv4_jax.weight_files import DTYPES, INDEX_NAME, WeightFiles

GOLDEN = Path(__file__).parent.parent / "data"
DSPARK = dataclasses.replace(
    TINY,
    compress_ratios=(*TINY.main_ratios, 0, 0, 0),
    dspark_block_size=2,
    dspark_noise_token_id=7,
    dspark_target_layer_ids=(2, 3, 4),
    dspark_markov_rank=32,
)


def write_headers(folder: Path, config: Config, shards: int) -> None:
    """A checkpoint whose files have their full size and hold nothing but headers: the rest is holes."""
    tensors = list(expected_tensors(config, mtp=True).items())
    weight_map = {}
    for number in range(shards):
        header, end = {}, 0
        for name, (dtype, shape) in tensors[number::shards]:
            begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / f"{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, f"{number}.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture
def changed(tmp_path) -> Callable[[dict[str, np.ndarray | None]], Path]:
    """TINY with some tensors in place of others; those that are None are left out."""

    def write_changed(changes: dict[str, np.ndarray | None]) -> Path:
        write_checkpoint(tmp_path / "whole", TINY)
        with WeightFiles.open(tmp_path / "whole") as files:
            tensors = {name: files.read(name) for name in files.tensors}
        folder = tmp_path / "changed"
        folder.mkdir()
        (tmp_path / "whole" / "config.json").rename(folder / "config.json")
        kept = {name: each for name, each in (tensors | changes).items() if each is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    return write_changed


def test_the_headers_of_flash_are_read_in_seconds(tmp_path):
    write_headers(tmp_path, FLASH, shards=46)

    begin = time.process_time()
    report = inspect_checkpoint(tmp_path)
    seconds = time.process_time() - begin

    assert report.ok
    assert report.lines() == [
        "46 shards, 69,187 tensors, 159.6 GB:"
        " BF16 433, F32 417, F8_E4M3 375, F8_E8M0 34,167, I64 3, I8 33,792",
        "DeepSeek-V4: 43 layers (2 SWA, 21 CSA, 20 HCA), hidden 4096, 256 experts (fp4),"
        " 284.3B parameters + MTP head 6.6B",
        "schema: OK (0 missing, 0 unexpected, 0 mismatched)",
    ]
    assert report.dtypes["I8"] == (33_792, 141_733_920_768)
    assert (report.main_parameters, report.draft_parameters) == (284_332_240_471, 6_610_048_891)
    assert seconds < 5
    for shard in tmp_path.glob("*.safetensors"):  # a copy of these would fill the disk
        shard.unlink()


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "tiny-fp4",
            [
                "3 shards, 508 tensors, 5.0 MB: BF16 56, F32 58, F8_E4M3 52, F8_E8M0 196, I64 2, I8 144",
                "DeepSeek-V4: 5 layers (1 SWA, 2 CSA, 2 HCA), hidden 128, 8 experts (fp4),"
                " 4.4M parameters + MTP head 0.7M",
            ],
        ),
        (
            "tiny-fp8",
            [
                "2 shards, 368 tensors, 5.0 MB: BF16 59, F32 182, F8_E4M3 124, I64 3",
                "DeepSeek-V4: 5 layers (2 CSA, 3 HCA), hidden 128, 4 experts (fp8),"
                " 3.4M parameters + MTP head 0.5M",
            ],
        ),
    ],
)
def test_the_golden_checkpoints_are_as_they_should_be(name, lines):
    report = inspect_checkpoint(GOLDEN / name)

    assert report.lines() == [*lines, "schema: OK (0 missing, 0 unexpected, 0 mismatched)"]


def test_what_is_wrong_is_counted_and_listed(changed):
    report = inspect_checkpoint(
        changed(
            {
                "layers.0.attn.wq_a.scale": None,
                "layers.3.attn.attn_sink": None,
                "layers.9.attn_norm.weight": np.zeros(128, ml_dtypes.bfloat16),
                "norm.weight": np.ones(128, np.float32),
                "mtp.0.ffn.experts.5.w2.weight": np.zeros((128, 63), np.int8),
            }
        )
    )

    assert not report.ok
    assert report.lines()[2:] == [
        "schema: WRONG (2 missing, 1 unexpected, 2 mismatched)",
        "  missing: layers.0.attn.wq_a.scale",
        "  missing: layers.3.attn.attn_sink",
        "  unexpected: layers.9.attn_norm.weight",
        "  mismatched: norm.weight is F32 [128], expected BF16 [128]",
        "  mismatched: mtp.0.ffn.experts.5.w2.weight is I8 [128, 63], expected I8 [128, 64]",
    ]


def test_a_long_list_is_cut_short_for_humans_only(changed):
    names = [
        f"layers.2.ffn.experts.{expert}.{part}" for expert in range(8) for part in ("w1.weight", "w1.scale")
    ]

    report = inspect_checkpoint(changed(dict.fromkeys(names)))

    assert sorted(report.missing) == sorted(names)
    assert report.lines()[-1] == "  and 6 more missing"
    assert len(report.lines()) == 14
    assert len(report.to_dict()["missing"]) == 16


def test_linears_in_bf16_are_as_good_as_quantised_ones(tmp_path):
    write_checkpoint(tmp_path / "made-up", TINY, unquantised=["layers.1.attn.wkv", "mtp.0.e_proj"])

    report = inspect_checkpoint(tmp_path / "made-up")

    assert report.ok
    assert report.main_parameters == inspect_checkpoint(GOLDEN / "tiny-fp4").main_parameters


@pytest.mark.parametrize(
    ("config", "mtp", "draft"),
    [
        (TINY, True, "MTP head"),
        (TINY, False, "none"),
        (DSPARK, True, "DSpark draft (not run)"),
        (DSPARK, False, "none"),
        (
            dataclasses.replace(TINY, num_nextn_predict_layers=0, compress_ratios=TINY.main_ratios),
            True,
            "none",
        ),
    ],
)
def test_the_kind_of_draft_is_told_from_config_and_tensors(tmp_path, config, mtp, draft):
    write_checkpoint(tmp_path / "made-up", config, mtp=mtp)

    report = inspect_checkpoint(tmp_path / "made-up")

    assert report.ok
    assert report.draft == draft
    assert (report.draft_parameters > 0) == (draft != "none")
    assert (draft in report.lines()[1]) == (draft != "none")


def test_a_dspark_draft_is_checked_too(tmp_path):
    write_headers(tmp_path, DSPARK, shards=1)
    header_of_mtp = dataclasses.replace(DSPARK, dspark_markov_rank=64)
    (tmp_path / "config.json").write_text(json.dumps(header_of_mtp.to_dict()))

    report = inspect_checkpoint(tmp_path)

    assert [each.name for each in report.mismatched] == [
        "mtp.2.confidence_head.proj.weight",
        "mtp.2.markov_head.markov_w1.weight",
        "mtp.2.markov_head.markov_w2.weight",
    ]


@pytest.mark.parametrize(("expert_dtype", "scale_dtype"), [("fp4", "F8_E8M0"), ("fp8", "F32")])
def test_the_scale_dtype_is_that_of_the_tensors(tmp_path, expert_dtype, scale_dtype):
    write_checkpoint(tmp_path / "made-up", dataclasses.replace(TINY, expert_dtype=expert_dtype))

    report = inspect_checkpoint(tmp_path / "made-up")

    assert (report.expert_format, report.scale_dtype) == (expert_dtype, scale_dtype)


def test_the_whole_report_goes_into_json(changed):
    report = inspect_checkpoint(changed({"norm.weight": np.ones(128, np.float32), "hc_head_fn": None}))

    found = json.loads(json.dumps(report.to_dict()))

    assert found["ok"] is False
    assert found["tensors"] == 507
    assert found["dtypes"]["I64"] == {"tensors": 2, "nbytes": 2 * 512 * 2 * 8}
    assert found["missing"] == ["hc_head_fn"]
    assert found["mismatched"] == [{"name": "norm.weight", "found": "F32 [128]", "expected": "BF16 [128]"}]
    assert Config.from_dict(found["config"]) == TINY
    assert report.lines()[0].startswith("1 shard, 507 tensors")


def test_a_folder_without_a_model_is_an_error_and_no_report(tmp_path):
    with pytest.raises(CheckpointError, match="no such file") as caught:
        inspect_checkpoint(tmp_path)
    assert caught.value.exit_code == 66

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="deepseek_v4 only"):
        inspect_checkpoint(tmp_path)
