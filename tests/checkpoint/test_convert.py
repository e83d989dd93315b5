"""Converted checkpoints: the same parameters on any mesh, whatever interrupts it, and no flipped bit."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsv4_jax.checkpoint import convert as convert_module
from dsv4_jax.checkpoint.convert import convert
from dsv4_jax.checkpoint.converted import FILES, MANIFEST, STATE, array_sum, verify_files
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.errors import CheckpointError, DSV4Error, NumericError, OutputError
from dsv4_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def converted(wide, tmp_path_factory) -> Path:
    return convert(wide, tmp_path_factory.mktemp("converted") / "wide")


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A converted checkpoint to do harm to."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def assert_same(found: LoadedModel, expected: LoadedModel) -> None:
    def same(found, expected) -> None:
        assert found.dtype == expected.dtype
        assert found.sharding == expected.sharding
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()

    assert found.config == expected.config
    trees = ((each.params, each.mtp_params) for each in (found, expected))
    jax.tree.map(same, *trees)


# The same parameters.


def test_a_converted_checkpoint_loads_as_the_original_does(wide, converted):
    assert_same(load(converted, mtp=True, verify="values"), load(wide, mtp=True))
    assert load(converted).mtp_params is None


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [((1, 1, 8), "tp"), ((1, 4, 2), "dp-attention"), ((2, 2, 1), "ep")],
    ids=["uneven blocks and pieces of groups", "experts in eight", "two copies"],
)
def test_it_is_restored_onto_any_mesh(sizes, rules, wide, converted):
    how = {"mtp": True, "mesh": make_mesh(*sizes), "rules": rules}

    assert_same(load(converted, **how), load(wide, **how))


def test_it_may_be_written_from_a_mesh(wide, converted, tmp_path):
    convert(wide, tmp_path / "from a mesh", mesh=make_mesh(ep=4))

    assert manifest(tmp_path / "from a mesh") == manifest(converted)


def test_arrays_have_the_sums_of_the_numbers_that_are_loaded(wide, converted):
    loaded, arrays = load(wide, mtp=True), manifest(converted)["arrays"]

    w2 = loaded.params["layers"][1]["ffn"]["experts"]["w2"]
    assert arrays["layers.1/ffn.experts.w2/values"] == array_sum(np.asarray(w2.values))
    assert arrays["layers.1/ffn.experts.w2/scale"] == array_sum(np.asarray(w2.scale))
    assert arrays["model/embed.weight/array"] == array_sum(np.asarray(loaded.params["embed"]["weight"]))
    assert len(arrays) == len(jax.tree.leaves((loaded.params, loaded.mtp_params)))


# Interruptions.


@pytest.mark.parametrize("finished", [0, 2, 4])
def test_an_interrupted_conversion_goes_on_and_gives_the_same(
    finished, wide, converted, tmp_path, monkeypatch
):
    """Of four pieces `finished` are done; then one is half written, or the last files are missing."""
    out, written, write = tmp_path / "out", [], convert_module._write

    def interrupted(out: Path, piece: str, *rest):
        sums = write(out, piece, *rest)
        if len(written) == finished:
            next(path for path in (out / piece).rglob("*") if path.is_file()).unlink()
            raise KeyboardInterrupt
        written.append(piece)
        return sums

    def before_the_end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_write", interrupted)
    monkeypatch.setattr(convert_module, "_finish", before_the_end)
    with pytest.raises(KeyboardInterrupt):
        convert(wide, out)
    with (out / STATE).open("a") as state:
        state.write('{"piece": "torn off')
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="conversion was interrupted"):
        load(out)
    again = []
    monkeypatch.setattr(convert_module, "_write", lambda *each: (again.append(each[1]), write(*each))[1])

    convert(wide, out)

    assert sorted(written + again) == ["layers.0", "layers.1", "model", "mtp.0"]
    assert manifest(out) == manifest(converted)
    assert verify_files(out) > 0
    assert not (out / STATE).exists()


def test_a_piece_whose_files_are_gone_is_written_again(wide, converted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(convert_module, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(wide, out)
    monkeypatch.undo()
    shutil.rmtree(out / "layers.0")

    convert(wide, out)

    assert manifest(out) == manifest(converted)
    verify_files(out)


def test_what_is_written_wrong_is_found_at_once(wide, tmp_path, monkeypatch):
    save = ocp.StandardCheckpointer.save

    def careless(checkpointer, path, tree, **rest):
        if path.name == "layers.1":
            tree = tree | {"attn_norm.weight": {"array": np.zeros(128, ml_dtypes.bfloat16)}}
        return save(checkpointer, path, tree, **rest)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", careless)
    with pytest.raises(OutputError, match=r"layers\.1: attn_norm\.weight .*other numbers than were written"):
        convert(wide, tmp_path / "out")


def test_a_killed_conversion_goes_on(wide, converted, tmp_path):
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from dsv4_jax.checkpoint import convert\n"
        "write = convert._write\n"
        "def killed(out, piece, *rest):\n"
        "    sums = write(out, piece, *rest)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if piece == 'layers.1' else None\n"
        "    return sums\n"
        "convert._write = killed\n"
        "convert.convert(*sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(wide), str(out)], capture_output=True)
    assert killed.returncode == -9, killed.stderr

    convert(wide, out)

    assert manifest(out) == manifest(converted)
    verify_files(out)


# Where it is written.


def refused(wide: Path, out: Path, **options) -> OutputError:
    with pytest.raises(OutputError) as caught:
        convert(wide, out, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_that_holds_something_is_refused_unless_it_may_be_overwritten(wide, converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    error = refused(wide, tmp_path)
    assert error.message == f"{tmp_path} is not empty"
    assert error.exit_code == 73
    assert (tmp_path / "notes.txt").read_text() == "mine"

    convert(wide, tmp_path, overwrite=True)
    assert manifest(tmp_path) == manifest(converted)
    assert not (tmp_path / "notes.txt").exists()


def test_a_finished_checkpoint_is_not_written_over(wide, copy):
    assert refused(wide, copy).message == f"{copy} is not empty"


def test_the_beginning_of_another_conversion_is_refused(wide, tmp_path):
    (tmp_path / STATE).write_text('{"version": 1, "source": "another"}\n')

    assert "beginning of another conversion" in refused(wide, tmp_path).message


def test_a_relative_path_is_resolved(wide, converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert convert(wide, "here") == tmp_path / "here"
    assert manifest(tmp_path / "here") == manifest(converted)


def test_two_conversions_do_not_write_one_folder(wide, tmp_path, monkeypatch):
    write, errors = convert_module._write, []

    def second(*each):
        monkeypatch.setattr(convert_module, "_write", write)
        errors.append(refused(wide, tmp_path / "out"))
        return write(*each)

    monkeypatch.setattr(convert_module, "_write", second)
    convert(wide, tmp_path / "out")

    assert errors[0].message.endswith("is being written by another conversion")
    assert errors[0].exit_code == 75


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_a_path_that_cannot_be_a_folder_is_refused(what, wide, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" if what == "below a file" else tmp_path / "file"

    assert refused(wide, out).exit_code == 73


def test_a_full_disk_is_told_with_how_to_go_on(wide, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [ENOSPC]")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    error = refused(wide, tmp_path / "out")

    assert error.exit_code == 75
    assert "run the same command again" in error.hint


# What cannot be trusted.


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_hundred_flipped_bits_are_found_a_hundred_times(copy):
    choose = random.Random(0)
    files = [path for path in copy.rglob("*") if path.is_file()]
    bits = [8 * path.stat().st_size for path in files]
    # Half of them anywhere in the bytes, half in any of the files, most of which are small.
    chosen = choose.choices(files, bits, k=50) + choose.choices(files, k=50)
    found = 0
    for path in chosen:
        bit = choose.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            verify_files(copy)
        except CheckpointError as error:
            found += "\n" not in str(error)
        flip(path, bit)

    assert found == 100
    verify_files(copy)


def test_loading_with_full_verification_finds_a_flipped_bit_and_names_its_file(copy):
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(largest, 4 * largest.stat().st_size)

    with pytest.raises(CheckpointError, match="sha256 is not what it was") as caught:
        load(copy, verify="full")

    assert str(largest) in caught.value.message
    assert caught.value.exit_code == 65


def with_manifest(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(change(manifest(folder))))

    return write


@pytest.mark.parametrize(
    ("harm", "verify", "message", "code"),
    [
        (
            with_manifest(lambda each: each | {"version": 0}),
            "header",
            "is of version 0, this package reads",
            65,
        ),
        (with_manifest(lambda each: {}), "header", "is of version None", 65),
        (lambda folder: (folder / MANIFEST).unlink(), "full", "no such file", 66),
        (lambda folder: (folder / FILES).unlink(), "full", "no such file", 66),
        (
            lambda folder: (folder / FILES).write_text('{"files": {}, "sha256": ""}'),
            "full",
            "its own sum",
            65,
        ),
        (lambda folder: shutil.rmtree(folder / "layers.1"), "header", "lacks layers.1", 66),
        (lambda folder: shutil.rmtree(folder / "layers.1"), "full", "lacks layers.1/", 66),
        (lambda folder: (folder / "layers.1" / "_METADATA").write_text("{}"), "header", "layers.1", 65),
        (lambda folder: shutil.rmtree(folder / "layers.1" / "ocdbt.process_0"), "header", "layers.1", 65),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(harm, verify, message, code, copy):
    harm(copy)

    with pytest.raises(CheckpointError) as caught:
        load(copy, verify=verify)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


def test_without_a_manifest_it_loads_with_a_warning(copy, wide):
    (copy / MANIFEST).unlink()

    with pytest.warns(UserWarning, match="has no manifest.json"):
        found = load(copy, mtp=True)

    assert_same(found, load(wide, mtp=True))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(128, np.float32), "float32 [128], expected bfloat16 [128]"),
        (np.zeros(64, ml_dtypes.bfloat16), "bfloat16 [64], expected bfloat16 [128]"),
    ],
    ids=["dtype", "shape"],
)
def test_an_array_of_another_dtype_or_shape_is_refused_and_never_cast(array, message, copy):
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(copy / "model")
        checkpointer.save(copy / "model", leaves | {"norm.weight": {"array": array}}, force=True)

    with pytest.raises(CheckpointError) as caught:
        load(copy)

    assert f"norm.weight (array) is {message}" in str(caught.value)


def test_numbers_that_are_not_finite_are_found(copy):
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(copy / "model")
        broken = np.full(128, np.nan, ml_dtypes.bfloat16)
        checkpointer.save(copy / "model", leaves | {"norm.weight": {"array": broken}}, force=True)

    with pytest.raises(NumericError, match=r"model: norm\.weight holds values that are not finite"):
        load(copy, verify="values")


def test_an_original_checkpoint_has_nothing_to_verify_it_by(wide):
    with pytest.raises(CheckpointError, match="has no sums to verify it by"):
        load(wide, verify="full")


def test_every_error_is_ours(copy):
    """Each file in turn is cut in half."""
    for path in sorted(each for each in (copy / "layers.0").rglob("*") if each.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with contextlib.suppress(DSV4Error):  # some files orbax can do without
            load(copy)
        path.write_bytes(data)
