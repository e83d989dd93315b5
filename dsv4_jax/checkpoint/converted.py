"""A converted checkpoint: the same parameters as orbax arrays, one folder a layer, with sums of everything.

    FOLDER/
      config.json, tokenizer.json...   as they were
      model/                           embedding, head, and what stands before it: an orbax checkpoint
      layers.0/, layers.1/...          a layer: experts are stacked, numbers as they were stored
      mtp.0/                           the MTP head or a stage of a DSpark draft
      manifest.json                    dtype, shape and sha256 of each array: the same however it was written
      files.json                       size and sha256 of each file, and of itself
      convert_state.jsonl              while it is written: what is done

Neither orbax nor safetensors notices a flipped bit; `verify_files` finds each.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.names import Parameter
from dsv4_jax.errors import EXIT_NO_INPUT, CheckpointError
from dsv4_jax.weight_files import read_json_object
from pallas_kernels import QuantArray

VERSION = 1
MANIFEST, FILES, STATE = "manifest.json", "files.json", "convert_state.jsonl"
AS_THEY_WERE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_MAX_NBYTES = 2**26  # of manifest.json and files.json
_HASH_AT_ONCE = 2**22
_THREADS = 8

Sums = dict[str, dict[str, Any]]


def is_converted(folder: str | Path) -> bool:
    """Whether a folder is a converted checkpoint, whole or not."""
    return any((Path(folder) / name).exists() for name in (MANIFEST, FILES, STATE, "model/_METADATA"))


def pieces(parameters: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    """Parameters by the folder they are in."""
    found: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        first, second, *_ = (*parameter.path, "")
        piece = f"{first}.{second}" if isinstance(second, int) else "model"
        found.setdefault(piece, []).append(parameter)
    return found


def name_in_piece(parameter: Parameter) -> str:
    """What a parameter is called inside its folder."""
    inside = parameter.path[2:] if isinstance(parameter.path[1], int) else parameter.path
    return ".".join(map(str, inside))


def leaf_names(parameter: Parameter) -> tuple[str, ...]:
    """What the arrays of a parameter are called."""
    return ("values", "scale") if isinstance(parameter.value, QuantArray) else ("array",)


def array_names(parameters: Sequence[Parameter]) -> Iterator[tuple[str, Parameter, str]]:
    """Each array's name in the manifest, its parameter, and its own name in that."""
    for piece, inside in pieces(parameters).items():
        for parameter in inside:
            for leaf in leaf_names(parameter):
                yield f"{piece}/{name_in_piece(parameter)}/{leaf}", parameter, leaf


# --- sums


def array_sum(array: np.ndarray) -> dict[str, Any]:
    """An array's entry in the manifest."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(data.data).hexdigest(),
    }


def file_sums(folder: Path, names: Sequence[str]) -> Sums:
    """Size and sha256 of files, which are on the disk from then on."""

    def of_file(name: str) -> dict[str, Any]:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while data := file.read(_HASH_AT_ONCE):
                digest.update(data)
            os.fsync(file.fileno())
            return {"nbytes": file.tell(), "sha256": digest.hexdigest()}

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of_file, names), strict=True))


def files_below(folder: Path, piece: str) -> list[str]:
    """The files of a piece, named from the checkpoint folder on."""
    return sorted(str(path.relative_to(folder)) for path in (folder / piece).rglob("*") if path.is_file())


def sum_of(sums: Mapping[str, Any]) -> str:
    """Of sums themselves."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def check_finished(folder: Path) -> None:
    """Refuses a folder that is still being written.

    Raises:
      CheckpointError: it is, or was till the conversion was interrupted.
    """
    if (folder / STATE).exists():
        raise CheckpointError(
            f"{folder}: its conversion was interrupted",
            hint="run the same `dsv4-jax convert` again: it goes on",
        )


def read_manifest(folder: Path) -> Sums:
    """dtype, shape and sha256 of each array.

    Raises:
      CheckpointError: there is none (66), it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", hint="convert it again", exit_code=EXIT_NO_INPUT)
    manifest = read_json_object(path, _MAX_NBYTES, CheckpointError)
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: is of version {manifest.get('version')!r}, this package reads version {VERSION}",
            hint="convert the original checkpoint again",
        )
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{path}: its arrays are {type(arrays).__name__}, want a JSON object")
    return arrays


def verify_files(folder: str | Path) -> int:
    """Holds every byte of a converted checkpoint against its sums; gives how many bytes that were.

    Of several processes each reads its share.

    Raises:
      CheckpointError: a file is absent (66), or differs; it names the first that does.
    """
    folder = Path(folder)
    check_finished(folder)
    read_manifest(folder)
    path = folder / FILES
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", hint="convert it again", exit_code=EXIT_NO_INPUT)
    listed = read_json_object(path, _MAX_NBYTES, CheckpointError)
    files = listed.get("files")
    if not isinstance(files, dict) or listed != {"files": files, "sha256": sum_of(files)}:
        raise CheckpointError(
            f"{path}: differs from its own sum", hint="copy or convert the checkpoint again"
        )
    own = sorted(files)[jax.process_index() :: jax.process_count()]
    if absent := [name for name in own if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(absent[:3])}", hint="copy it again", exit_code=EXIT_NO_INPUT
        )
    for name, found in file_sums(folder, own).items():
        if found != files[name]:
            what = "size" if found["nbytes"] != files[name]["nbytes"] else "sha256"
            raise CheckpointError(
                f"{folder / name}: its {what} is not what it was when it was written",
                hint="copy or convert the checkpoint again",
            )
    return sum(files[name]["nbytes"] for name in own)


def as_declared(parameter: Parameter, arrays: Mapping[str, Mapping[str, Any]], folder: Path) -> Parameter:
    """The parameter in the format that these arrays have.

    Args:
      arrays: dtype and shape by the names of `leaf_names`.

    Raises:
      CheckpointError: a dtype or shape is not one the parameter can have.
    """
    value = parameter.value
    if isinstance(value, QuantArray) and "array" in arrays:
        parameter = parameter._replace(value=jax.ShapeDtypeStruct(value.shape, jnp.bfloat16))
    elif isinstance(value, QuantArray) and arrays["scale"]["dtype"] == "float32":
        scale: Any = jax.ShapeDtypeStruct(value.scale.shape, jnp.float32)
        parameter = parameter._replace(value=QuantArray(value.values, scale, value.format))
    elif isinstance(value, QuantArray):
        scale = jax.ShapeDtypeStruct(value.scale.shape, jnp.uint8)
        parameter = parameter._replace(value=QuantArray(value.values, scale, value.format))
    for name, leaf in zip(leaf_names(parameter), jax.tree.leaves(parameter.value), strict=True):
        found = arrays[name]
        if (found["dtype"], list(found["shape"])) != (str(leaf.dtype), list(leaf.shape)):
            raise CheckpointError(
                f"{folder}: {'.'.join(map(str, parameter.path))} ({name}) is {found['dtype']}"
                f" {list(found['shape'])}, expected {leaf.dtype} {list(leaf.shape)}",
                hint="does config.json belong to these arrays?",
            )
    return parameter
