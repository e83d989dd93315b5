"""A fingerprint tells models apart."""

import json
import shutil

import pytest

from dsv4_jax.checkpoint.fingerprint import fingerprint
from dsv4_jax.errors import CheckpointError


def test_a_copy_has_the_same_and_any_change_another(text_checkpoint, tmp_path):
    copy = shutil.copytree(text_checkpoint, tmp_path / "copy")
    whole = fingerprint(text_checkpoint)
    (shard,) = copy.glob("*.safetensors")
    data = shard.read_bytes()

    assert fingerprint(copy) == whole
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(copy) != whole
    shard.write_bytes(data)
    (copy / "tokenizer.json").unlink()
    assert fingerprint(copy) != whole


def test_a_converted_checkpoint_is_told_by_its_manifest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(json.dumps({"a": 1}))
    before = fingerprint(tmp_path)

    (tmp_path / "manifest.json").write_text(json.dumps({"a": 2}))

    assert fingerprint(tmp_path) != before


def test_nothing_has_no_fingerprint(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        fingerprint(tmp_path / "nope")
