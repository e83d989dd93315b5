"""A folder of shards: bytes come back as written, and nothing that a folder may hold gives a traceback."""

import json
import math
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from dsv4_jax.errors import CheckpointError
from dsv4_jax.weight_files import DTYPES, INDEX_NAME, WeightFiles

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard_bytes(header: dict | bytes, body: bytes = b"", pad: int = 0) -> bytes:
    """A shard with no padding but `pad` spaces, so that tensors begin at any address."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text)) + text + body


VALID = {"a": entry("F32", [2, 3], 0, 24), "b": entry("I8", [5], 24, 29)}
VALID_BODY = bytes(range(29))
WEIGHT_MAP = {"a": FIRST, "b": FIRST, "c": SECOND}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index: a and b in the first, c in the second."""
    (tmp_path / FIRST).write_bytes(shard_bytes(VALID, VALID_BODY))
    (tmp_path / SECOND).write_bytes(shard_bytes({"c": entry("U8", [4], 0, 4)}, b"wxyz"))
    write_index(tmp_path, WEIGHT_MAP)
    return tmp_path


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles.open(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_tells_its_shards_tensors_and_bytes(folder):
    with WeightFiles.open(folder) as files:
        assert files.shards == (folder / FIRST, folder / SECOND)
        assert files.nbytes == 33
        assert sorted(files.tensors) == ["a", "b", "c"]
        header_nbytes = len(json.dumps(VALID))
        assert files.tensors["b"] == ("b", "I8", (5,), folder / FIRST, 8 + header_nbytes + 24, 5)


@pytest.mark.parametrize("pad", range(8), ids="header+{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_come_back_as_written(tmp_path, dtype, pad):
    written = np.random.default_rng(pad).integers(0, 2, 6 * DTYPES[dtype].itemsize, np.uint8).tobytes()
    header = {"x": entry(dtype, [3, 2], 0, len(written))}
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, written, pad))

    with WeightFiles.open(tmp_path) as files:
        whole, rows = files.read("x"), files.read("x", 1, 2)

    assert (whole.dtype, whole.shape, whole.tobytes()) == (DTYPES[dtype], (3, 2), written)
    assert (rows.dtype, rows.shape, rows.tobytes()) == (DTYPES[dtype], (2, 2), written[len(written) // 3 :])


def test_all_256_codes_of_the_fp8_formats_survive(tmp_path):
    codes = bytes(range(256))
    header = {"weight": entry("F8_E4M3", [16, 16], 0, 256), "scale": entry("F8_E8M0", [256], 256, 512)}
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, codes * 2, pad=3))

    with WeightFiles.open(tmp_path) as files:
        weight, scale = files.read("weight"), files.read("scale")

    assert weight.dtype == ml_dtypes.float8_e4m3fn
    assert scale.dtype == ml_dtypes.float8_e8m0fnu
    assert weight.view(np.uint8).tobytes() == scale.view(np.uint8).tobytes() == codes
    assert weight.astype(np.float32).flat[0x38] == 1.0
    assert scale.astype(np.float32)[0x7B] == 2.0**-4


def test_rows_go_straight_into_the_array_given(folder):
    stacked = np.zeros((2, 3), np.float32)

    with WeightFiles.open(folder) as files:
        row = files.read("a", 1, 1, out=stacked[1])

    assert row.shape == (1, 3)
    assert np.shares_memory(row, stacked)
    assert stacked.tobytes() == bytes(12) + VALID_BODY[12:24]


def test_a_scalar_and_an_empty_tensor_keep_their_shapes(tmp_path):
    header = {"empty": entry("F32", [0, 7], 0, 0), "scalar": entry("F32", [], 0, 4)}
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, np.float32(2.5).tobytes()))

    with WeightFiles.open(tmp_path) as files:
        assert files.read("scalar").shape == ()
        assert files.read("scalar") == 2.5
        assert files.read("empty").shape == (0, 7)
        assert files.read("empty", 0, 0).shape == (0, 7)
        with pytest.raises(ValueError, match="scalar: rows 0 to 0 asked, it has 1"):
            files.read("scalar", 0, 0)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 3), (3, None), (1, -1)])
def test_rows_outside_a_tensor_and_unknown_tensors_are_refused(folder, start, count):
    with WeightFiles.open(folder) as files:
        with pytest.raises(ValueError, match=r"a: rows .* it has 2"):
            files.read("a", start, count)
        with pytest.raises(CheckpointError, match="no tensor 'A'"):
            files.read("A", start, count)


@pytest.mark.parametrize("out", [np.zeros(23, np.uint8), np.zeros((2, 6), np.float32)[:, ::2]])
def test_an_out_that_does_not_fit_is_refused(folder, out):
    with WeightFiles.open(folder) as files, pytest.raises(ValueError, match="out must be 24 writable bytes"):
        files.read("a", out=out)


def test_threads_share_one_descriptor_per_shard_and_map_nothing(folder):
    with WeightFiles.open(folder) as files, ThreadPoolExecutor(8) as threads:
        assert not shards_held(folder)
        read = list(threads.map(files.read, ["a", "c", "b"] * 200))
        held = shards_held(folder)
        mapped = [each.path for each in psutil.Process().memory_maps() if str(folder) in each.path]

    assert {array.tobytes() for array in read[0::3]} == {VALID_BODY[:24]}
    assert {array.tobytes() for array in read[1::3]} == {b"wxyz"}
    assert {array.tobytes() for array in read[2::3]} == {VALID_BODY[24:]}
    assert held == [FIRST, SECOND]
    assert not mapped
    assert not shards_held(folder)
    assert files.read("c").tobytes() == b"wxyz"  # opens again
    files.close()


def shards_held(folder: Path) -> list[str]:
    return sorted(Path(each.path).name for each in psutil.Process().open_files() if str(folder) in each.path)


def test_a_shard_cut_short_after_opening_is_an_error(folder):
    with WeightFiles.open(folder) as files:
        (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="ends inside 'c'"):
            files.read("c")


def test_147200_tensors_in_64_shards_open_within_three_seconds(tmp_path):
    names = [f"layers.{n % 61}.ffn.experts.{n}.w1.weight" for n in range(2300)]
    weight_map = {}
    for shard in range(64):
        header = {f"{shard}.{name}": entry("I8", [2, 2], 4 * n, 4 * n + 4) for n, name in enumerate(names)}
        (tmp_path / f"{shard}.safetensors").write_bytes(shard_bytes(header, bytes(4 * 2300)))
        weight_map |= dict.fromkeys(header, f"{shard}.safetensors")
    write_index(tmp_path, weight_map)

    begin = time.process_time()
    files = WeightFiles.open(tmp_path)
    seconds = time.process_time() - begin

    assert len(files.tensors) == 147_200
    assert seconds < 3


@pytest.mark.parametrize("name", ["absent", "absent/deeper", "x" * 300, "nul\0byte"])
def test_a_path_that_is_not_there_says_what_was_expected(tmp_path, name):
    error = refusal(tmp_path / name)

    assert error.exit_code == 66
    assert "no such directory" in error.message
    assert error.hint == "Expected a Hugging Face snapshot (config.json + model.safetensors.index.json)"


@pytest.mark.parametrize(
    ("name", "reason"), [("v4.gguf", "GGUF is not supported"), ("model.safetensors", "a file, not a folder")]
)
def test_a_file_in_place_of_the_folder_is_named(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"GGUF")

    error = refusal(tmp_path / name)

    assert error.exit_code == 66
    assert error.message == f"{tmp_path / name}: {reason}"


@pytest.mark.parametrize(
    ("names", "exit_code", "reason"),
    [
        ([], 66, "no *.safetensors"),
        (["config.json", "README.md"], 66, "no *.safetensors"),
        (["v4-Q4.gguf"], 66, "GGUF is not supported"),
        (["pytorch_model.bin"], 65, "pickle weights are never loaded"),
        (["consolidated.00.pth", "notes.txt"], 65, "pickle weights are never loaded"),
        (["a.safetensors", "b.safetensors"], 65, "2 shards but no model.safetensors.index.json"),
    ],
)
def test_a_folder_without_usable_weights_says_why(tmp_path, names, exit_code, reason):
    for name in names:
        (tmp_path / name).write_bytes(b"")

    error = refusal(tmp_path)

    assert error.exit_code == exit_code
    assert reason in error.message


def test_a_lone_shard_of_any_name_needs_no_index(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(shard_bytes(VALID, VALID_BODY))
    (tmp_path / "._weights.safetensors").write_bytes(b"left by macOS")

    assert sorted(WeightFiles.open(str(tmp_path)).tensors) == ["a", "b"]


# The index.


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "all of it", 3, {"a": 1}, {"a": None}, {"a": [FIRST]}], ids=repr
)
def test_a_weight_map_of_the_wrong_shape_is_refused(folder, weight_map):
    write_index(folder, weight_map)

    error = refusal(folder)

    assert error.exit_code == 65
    assert INDEX_NAME in error.message
    assert "weight_map" in error.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", ":1:1: empty"),
        (b'{"weight_map":\n {"a" 1}}', ":2:7: not JSON: Expecting ':' delimiter"),
        (b"[1, 2]", ":1:1: want a JSON object, found [1, 2]"),
        (b"\xff\xfe\xfa", "not usable JSON"),
        (b'{"weight_map": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git LFS pointer"),
    ],
    ids=["empty", "no colon", "array", "not UTF-8", "deep", "long integer", "LFS pointer"],
)
def test_an_index_that_is_not_a_json_object_is_refused(folder, text, reason):
    (folder / INDEX_NAME).write_bytes(text)

    error = refusal(folder)

    assert error.exit_code == 65
    assert reason in error.message


def test_an_index_beyond_the_size_limit_is_not_parsed(folder, monkeypatch):
    monkeypatch.setattr("dsv4_jax.weight_files.MAX_INDEX_NBYTES", 50)

    assert "longer than 50 bytes" in refusal(folder).message


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b.safetensors", "..", "/x.safetensors"]
)
def test_a_shard_name_that_leaves_the_folder_is_refused(folder, name):
    write_index(folder, {"a": FIRST, "b": name})

    error = refusal(folder)

    assert error.exit_code == 65
    assert f"{name!r} escapes the checkpoint folder" in error.message


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".pth", ".PT"])
def test_pickles_are_never_loaded(folder, suffix):
    (folder / f"model{suffix}").write_bytes(b"\x80\x04.")
    write_index(folder, {"a": FIRST, "b": f"model{suffix}"})

    error = refusal(folder)

    assert error.exit_code == 65
    assert "pickle weights are never loaded" in error.message


@pytest.mark.parametrize("name", ["", ".", "config.json", "model.safetensors.txt"])
def test_a_shard_must_be_a_safetensors_file(folder, name):
    write_index(folder, {"a": name})

    assert f"{name!r} is not a .safetensors file" in refusal(folder).message


def test_every_absent_shard_is_named_at_once(folder):
    strange = ["nul\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"]
    write_index(folder, dict(zip("abcdef", [FIRST, "p.safetensors", "q.safetensors", *strange], strict=True)))

    error = refusal(folder)

    assert error.exit_code == 66
    assert "5 of 6 shards absent" in error.message
    assert all(repr(name) in error.message for name in ["p.safetensors", "q.safetensors", *strange])
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, f"'d' is not in '{SECOND}': no shard has it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"'b' is not in '{SECOND}': it is in {FIRST}"),
        ({"a": FIRST, "c": SECOND}, f"leaves out 1 tensor(s) of its shards, such as 'b' in {FIRST}"),
    ],
    ids=["in no shard", "in another shard", "not in the index"],
)
def test_index_and_shards_must_agree(folder, weight_map, reason):
    write_index(folder, weight_map)

    error = refusal(folder)

    assert error.exit_code == 65
    assert reason in error.message


def test_a_tensor_in_two_shards_is_refused(folder):
    (folder / SECOND).write_bytes(
        shard_bytes({"c": entry("U8", [1], 0, 1), "a": entry("U8", [1], 1, 2)}, b"xy")
    )

    error = refusal(folder)

    assert error.exit_code == 65
    assert f"{SECOND}: 'a' is also in {FIRST}" in error.message


def test_the_hugging_face_cache_layout_is_followed(folder, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models--deepseek-ai--DeepSeek-V4-Flash")
    snapshot = repository / "snapshots" / "60d8d70"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for blob, name in enumerate([FIRST, SECOND, INDEX_NAME]):
        (folder / name).rename(repository / "blobs" / f"{blob}")
        (snapshot / name).symlink_to(f"../../blobs/{blob}")

    assert WeightFiles.open(snapshot).read("c").tobytes() == b"wxyz"


def test_a_link_to_elsewhere_is_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / SECOND
    (folder / SECOND).rename(elsewhere)
    (folder / SECOND).symlink_to(elsewhere)

    error = refusal(folder)

    assert error.exit_code == 65
    assert f"{SECOND}: escapes the checkpoint folder, a link to {elsewhere}" in error.message


def test_a_folder_reached_through_a_link_is_read(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "v4"
    link.symlink_to(folder)

    assert WeightFiles.open(link).read("c").tobytes() == b"wxyz"


@pytest.mark.parametrize("target", ["gone", SECOND])
def test_a_link_that_leads_nowhere_counts_as_absent(folder, target):
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(target)

    error = refusal(folder)

    assert error.exit_code == 66
    assert f"1 of 2 shards absent: '{SECOND}'" in error.message


# The shards.


def test_a_directory_named_like_a_shard_is_refused(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()

    error = refusal(folder)

    assert error.exit_code == 65
    assert f"{SECOND}: not a regular file" in error.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "LFS pointer of 64 bytes"),
        (b"<!DOCTYPE html>\n<html><title>404</title>", "an HTML page of 40 bytes"),
        (b"PK\x03\x04" + bytes(60), "a zip archive of 64 bytes"),
        (shard_bytes(VALID, VALID_BODY)[:-10], "bytes, its header asks for"),
        (shard_bytes(VALID, VALID_BODY) + b"!", "bytes, its header asks for"),
        (shard_bytes(VALID)[:40], "40 bytes, its header asks for"),
        (b" <\0\0\0\0\0\0{", "9 bytes, its header asks for 15,400"),
        (b"\x01\x02\x03", "header too small"),
    ],
    ids=["0 bytes", "LFS", "HTML", "zip", "body cut", "trailing", "header cut", "like HTML", "3 bytes"],
)
def test_a_download_gone_wrong_is_recognised(folder, content, reason):
    (folder / SECOND).write_bytes(content)

    error = refusal(folder)

    assert error.exit_code == 65
    assert SECOND in error.message
    assert reason in error.message


def test_a_truncated_shard_tells_both_sizes_and_an_lfs_pointer_the_command(folder):
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(whole[:-10])
    assert f"{len(whole) - 10} bytes, its header asks for {len(whole)}" in refusal(folder).message

    (folder / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(folder).hint == "run git lfs pull in the folder"


@pytest.mark.parametrize(
    "content",
    {
        "header over 100 MB": struct.pack("<Q", 100_000_001) + b"{}",
        "header longer than the file": struct.pack("<Q", 5000) + b"{}",
        "not UTF-8": shard_bytes(b'{"\xff": 1}'),
        "not JSON": shard_bytes(b"{nope}"),
        "an array": shard_bytes(b"[]"),
        "a deep header": shard_bytes(b"[" * 50_000),
        "overlap": shard_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "hole": shard_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)),
        "reversed": shard_bytes({"a": entry("U8", [4], 4, 0)}, bytes(4)),
        "beyond the file": shard_bytes({"a": entry("U8", [9], 0, 9)}, bytes(4)),
        "shape and bytes differ": shard_bytes({"a": entry("F32", [3], 0, 8)}, bytes(8)),
        "overflowing shape": shard_bytes({"a": entry("U8", [2**40, 2**40], 0, 4)}, bytes(4)),
        "negative size": shard_bytes({"a": entry("U8", [-4], 0, 4)}, bytes(4)),
        "unknown dtype": shard_bytes({"a": entry("F8_E9M9", [4], 0, 4)}, bytes(4)),
        "a dtype without numpy": shard_bytes({"a": entry("F4", [8], 0, 4)}, bytes(4)),
        "no shape": shard_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)),
        "twice the same name": shard_bytes(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            b'"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        "no tensor": shard_bytes({}),
        "an end of 4300 digits": shard_bytes({"a": entry("U8", [4], 0, 10**4300 - 1)}, bytes(4)),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_damaged_header_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content[1])

    error = refusal(tmp_path)

    assert error.exit_code == 65
    assert "model.safetensors: " in error.message


@pytest.mark.parametrize("shape", [[2**63, 0], [1] * 70], ids=["too long", "too many dimensions"])
def test_a_shape_that_numpy_cannot_hold_is_an_error_of_the_file(tmp_path, shape):
    nbytes = math.prod(shape)
    (tmp_path / "model.safetensors").write_bytes(
        shard_bytes({"a": entry("U8", shape, 0, nbytes)}, bytes(nbytes))
    )

    with WeightFiles.open(tmp_path) as files, pytest.raises(CheckpointError, match="numpy cannot hold 'a'"):
        files.read("a")


# Anything at all.


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("arena")


def library_accepts(shard: Path) -> bool:
    """Whether safetensors opens the file, and finds at least one tensor, all of types that numpy has."""
    try:
        with safe_open(shard, framework="numpy") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return False
    return bool(dtypes) and dtypes <= DTYPES.keys()


def check_verdict(folder: Path, content: bytes) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(content)
    try:
        files = WeightFiles.open(folder)
    except CheckpointError:
        assert not library_accepts(shard)
        return
    assert library_accepts(shard)
    with files:
        for info in files.tensors.values():
            assert content[info.offset : info.offset + info.nbytes] == files.read(info.name).tobytes()


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, 200),
    new=st.binary(max_size=4) | st.sampled_from([b'"', b"}", b"[", b"0", b"1", b"9", b"-", b" ", b"\\u0000"]),
    grown=st.sampled_from([0, 0, 0, 1, -1]),
    cut=st.sampled_from([None, None, None, 7, 8, 100, -1, -29]),
)
def test_a_mutated_shard_gets_the_verdict_of_safetensors(arena, place, new, grown, cut):
    valid = shard_bytes(VALID, VALID_BODY)

    check_verdict(arena, (valid[:place] + new + valid[max(0, place + len(new) - grown) :])[:cut])


SIZES = st.integers(-2, 40) | st.sampled_from(
    [2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**400, 1.5, "4", None]
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "F6_E2M3", "f32", "", None, 7]),
        "shape": st.lists(SIZES, max_size=3) | SIZES,
        "data_offsets": st.lists(SIZES, max_size=3) | SIZES,
        "more": st.lists(st.text(max_size=3), max_size=2),
    },
)


LIKE_A = [entry("BF16", [2, 6], 0, 24), entry("F64", [3], 0, 24), entry("F8_E8M0", [1, 24, 1], 0, 24)]
LIKE_A += [entry("F8_E4M3", [24], 0, 24), entry("F4", [48], 0, 24)]
EMPTY = [entry("F32", [0, 2**40], 0, 0), entry("F32", [0], 24, 24), entry("I64", [0], 29, 29)]


@settings(max_examples=300, deadline=None)
@given(
    a=st.sampled_from(LIKE_A) | ENTRIES,
    other=st.dictionaries(
        st.sampled_from(["b", "c", "", "../../etc/x", "__metadata__"]),
        st.sampled_from([*EMPTY, {"format": "pt"}]) | ENTRIES,
        max_size=1,
    ),
    body=st.sampled_from([VALID_BODY, VALID_BODY, b"", bytes(64)]),
    pad=st.integers(0, 9),
)
def test_a_header_with_other_entries_gets_the_verdict_of_safetensors(arena, a, other, body, pad):
    header = VALID | {name: VALID.get(name, {}) | fields for name, fields in {"a": a, **other}.items()}

    check_verdict(arena, shard_bytes(header, body, pad))


PATHS = st.lists(
    st.sampled_from([FIRST, SECOND, "..", ".", "", "a", "x.bin", "~", "nul\0", "\ud800", "C:", "x" * 300]),
    max_size=3,
).map("/".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | PATHS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    weight_map=st.dictionaries(st.sampled_from("abcd"), PATHS | JSON, max_size=2).map(WEIGHT_MAP.__or__)
    | JSON,
    renamed=st.sampled_from(["", "", "./", ".//", "a/../", "/"]),
)
def test_any_index_either_matches_the_shards_or_is_refused(tmp_path_factory, weight_map, renamed):
    if renamed and isinstance(weight_map, dict) and "c" in weight_map:
        weight_map["c"] = f"{renamed}{SECOND}"
    folder = tmp_path_factory.getbasetemp() / "any_index"
    folder.mkdir(exist_ok=True)
    (folder / FIRST).write_bytes(shard_bytes(VALID, VALID_BODY))
    (folder / SECOND).write_bytes(shard_bytes({"c": entry("U8", [4], 0, 4)}, b"wxyz"))
    write_index(folder, weight_map)

    try:
        files = WeightFiles.open(folder)
    except CheckpointError:
        return
    assert {name: info.file for name, info in files.tensors.items()} == {
        name: folder / shard for name, shard in weight_map.items()
    }
