"""A folder of safetensors shards: which file holds which bytes, and how to read them.

Nothing here knows the model. The safetensors library is the only parser of a shard's header, so no file means
one thing to it and another to us. The bytes are then read with `pread`: the library cannot hand FP8 to numpy,
and pages of a memory map would count as resident memory.
"""

import json
import math
import os
import reprlib
import threading
from collections.abc import Iterable
from io import FileIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsv4_jax.errors import EXIT_NO_INPUT, CheckpointError, DSV4Error

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_NBYTES = 256 * 2**20  # DeepSeek-V4-Pro's, with 145,116 names, takes about 13 MiB

EXPECTED = f"Expected a Hugging Face snapshot (config.json + {INDEX_NAME})"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}

# Without the types below a byte (F4, F6): numpy has no packed form of them.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}


class TensorInfo(NamedTuple):
    """Where one tensor lies: `nbytes` bytes of `file` from `offset`, row-major, little-endian."""

    name: str
    dtype: str  # safetensors' own word, a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the beginning of the file; any number, not always a multiple of the item size
    nbytes: int


class WeightFiles:
    """The tensors of a checkpoint folder, known from the headers alone.

    Keeps at most one descriptor open per shard. Threads may read at the same time; `close`, or leaving the
    `with` block, must wait until they have finished.
    """

    def __init__(self, folder: Path, tensors: Iterable[TensorInfo]):
        self.folder = folder
        self.tensors = {info.name: info for info in tensors}
        self.shards = tuple(sorted({info.file for info in self.tensors.values()}))
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self._open_files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads the index and every shard's header, and no weights.

        Raises:
          CheckpointError: the folder or a shard is absent (exit code 66); index or shard is damaged, they
            disagree, or a shard lies outside the folder (65).
        """
        folder = check_folder(folder)
        index = folder / INDEX_NAME
        if not index.exists():
            return cls(folder, _read_headers(_locate(folder, [_lone_shard(folder)])))
        shard_of = _read_index(index)
        shards = _locate(folder, sorted(set(shard_of.values())))
        tensors = _read_headers(shards)
        _check_index(index, shard_of, tensors)
        return cls(folder, tensors)

    def read(
        self, name: str, start: int = 0, count: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows `start : start + count` of axis 0, by default the whole tensor.

        Args:
          out: receives the bytes; any contiguous writable array of exactly their number. The result is then a
            view of it.

        Returns:
          An array of the tensor's own dtype; bfloat16 and the FP8 formats are ml_dtypes' (F8_E8M0 is
          float8_e8m0fnu: reinterpret it with `.view(np.uint8)`, a cast would change it).

        Raises:
          CheckpointError: no such tensor, or the file cannot be read to the end.
          ValueError: rows outside the tensor, or an `out` that does not fit.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        rows = info.shape[0] if info.shape else 1  # a scalar is one row that cannot be left out
        count = rows - start if count is None else count
        if not 0 <= start <= start + count <= rows or (not info.shape and count != 1):
            raise ValueError(f"{name}: rows {start} to {start + count} asked, it has {rows}")
        row_nbytes = info.nbytes // max(rows, 1)
        nbytes = count * row_nbytes
        if out is None:
            out = np.empty(nbytes, np.uint8)
        elif out.nbytes != nbytes or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"{name}: out must be {nbytes} writable bytes in one piece, got {out.nbytes}")
        buffer = out.reshape(-1).view(np.uint8)
        self._fill(buffer, info, info.offset + start * row_nbytes)
        try:
            return buffer.view(DTYPES[info.dtype]).reshape((count, *info.shape[1:]) if info.shape else ())
        except ValueError as error:  # safetensors takes shapes such as [2**63, 0] and 65 dimensions
            raise CheckpointError(f"{info.file}: numpy cannot hold {name!r}: {error}") from error

    def close(self) -> None:
        """Closes the descriptors; a later `read` opens them again."""
        with self._lock:
            for file in self._open_files.values():
                file.close()
            self._open_files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, buffer: np.ndarray, info: TensorInfo, offset: int) -> None:
        left = memoryview(buffer)
        try:
            with self._lock:
                if info.file not in self._open_files:
                    self._open_files[info.file] = info.file.open("rb", buffering=0)
                descriptor = self._open_files[info.file].fileno()
            while left:  # one call moves at most 2 GiB
                got = os.preadv(descriptor, [left], offset)
                if not got:
                    raise CheckpointError(f"{info.file}: ends inside {info.name!r}, it was whole when opened")
                left, offset = left[got:], offset + got
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot read {info.name!r}: {error.strerror}") from error


def check_folder(path: str | Path) -> Path:
    """`path`, if it is a folder; a CheckpointError with exit code 66 that says what it is if not."""
    path = Path(path)
    if not _exists(path):
        reason = "no such directory"
    elif not path.is_dir():
        reason = "GGUF is not supported" if path.suffix.lower() == ".gguf" else "a file, not a folder"
    elif not os.access(path, os.R_OK | os.X_OK):
        reason = "this directory may not be read"
    else:
        return path
    raise CheckpointError(f"{path}: {reason}", hint=EXPECTED, exit_code=EXIT_NO_INPUT)


def read_json_object(path: Path, max_nbytes: int, error: type[DSV4Error]) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder, which may be anything at all.

    Raises:
      CheckpointError: the file is absent (exit code 66).
      error: it is longer than `max_nbytes`, or not a JSON object; names line and column where there are any.
    """
    if not path.is_file():
        reason = "not a regular file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {reason}", hint=EXPECTED, exit_code=EXIT_NO_INPUT)
    try:
        with path.open("rb") as file:
            text = file.read(max_nbytes + 1)
    except OSError as caught:
        raise error(f"{path}: cannot be read: {caught.strerror}") from caught
    if not text.strip():
        raise error(f"{path}:1:1: empty", hint="download it again")
    if _is_lfs_pointer(text):
        raise error(f"{path}: a git LFS pointer", hint="run git lfs pull in the folder")
    if len(text) > max_nbytes:
        raise error(f"{path}: longer than {max_nbytes:,} bytes")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as caught:
        raise error(f"{path}:{caught.lineno}:{caught.colno}: not JSON: {caught.msg}") from caught
    except RecursionError:  # no cause: its trace is as deep as the nesting
        raise error(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as caught:  # not UTF-8, or an integer of more than 4300 digits
        raise error(f"{path}: not usable JSON: {caught}") from caught
    if not isinstance(value, dict):
        raise error(f"{path}:1:1: want a JSON object, found {reprlib.repr(value)}")
    return value


def _read_index(index: Path) -> dict[str, str]:
    """Shard name by tensor name, as the file has it: no name has been checked to be a safe path."""
    weight_map = read_json_object(index, MAX_INDEX_NBYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {reprlib.repr(weight_map)}, want tensor: shard pairs")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: weight_map[{tensor!r}] is {reprlib.repr(shard)}, want a string")
    return weight_map


def _lone_shard(folder: Path) -> str:
    """The name of the only shard of a folder that has no index."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shards = [name for name in names if name.endswith(".safetensors")]
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise CheckpointError(
            f"{folder}: {len(shards)} shards but no {INDEX_NAME}", hint="download the index as well"
        )
    for name in names:
        if Path(name).suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle_refused(f"{folder / name}")
        if Path(name).suffix.lower() == ".gguf":
            raise CheckpointError(
                f"{folder / name}: GGUF is not supported", hint=EXPECTED, exit_code=EXIT_NO_INPUT
            )
    raise CheckpointError(f"{folder}: no *.safetensors", hint=EXPECTED, exit_code=EXIT_NO_INPUT)


def _locate(folder: Path, names: list[str]) -> list[Path]:
    """The path of every shard, once it is sure that all are regular files of this folder."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{folder / INDEX_NAME}: {name!r} escapes the checkpoint folder")
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle_refused(f"{folder / INDEX_NAME}: {name!r}")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{folder / INDEX_NAME}: {name!r} is not a .safetensors file")
    if absent := [name for name in names if not _exists(folder / name)]:
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(names)} shards absent: {', '.join(map(repr, absent))}",
            hint="download them into the folder",
            exit_code=EXIT_NO_INPUT,
        )
    # In the Hugging Face cache a snapshot is links from snapshots/<revision>/ to blobs/.
    home = folder.resolve()
    allowed = (home, home.parent.parent / "blobs")
    paths = sorted({folder / name for name in names})
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise CheckpointError(
                f"{path}: escapes the checkpoint folder, a link to {target}", hint="put the file itself there"
            )
    return paths


def _read_headers(shards: list[Path]) -> list[TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in _read_header(shard):
            if info.name in tensors:
                raise CheckpointError(f"{shard}: {info.name!r} is also in {tensors[info.name].file.name}")
            tensors[info.name] = info
    if not tensors:
        raise CheckpointError(f"{shards[0]}: holds no tensor")
    return list(tensors.values())


def _read_header(shard: Path) -> list[TensorInfo]:
    """The tensors of one shard in file order, where each begins at the end of the one before.

    That there is neither hole nor overlap is among the things that safetensors checks on opening.
    """
    try:
        with safe_open(shard, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            layout = [(name, each.get_dtype(), tuple(each.get_shape())) for name, each in slices]
        with shard.open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, error) from error
    tensors = []
    for name, dtype, shape in layout:
        if dtype not in DTYPES:
            raise CheckpointError(f"{shard}: {name!r} is {dtype}, have {', '.join(DTYPES)}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        tensors.append(TensorInfo(name, dtype, shape, shard, offset, nbytes))
        offset += nbytes
    return tensors


def _check_index(index: Path, shard_of: dict[str, str], tensors: list[TensorInfo]) -> None:
    """Holds the index against the shards both ways: a tensor it leaves out would be lost without a word."""
    file_of = {info.name: info.file for info in tensors}
    listed = {shard: index.parent / shard for shard in set(shard_of.values())}
    for name, shard in shard_of.items():
        found = file_of.get(name)
        if found != listed[shard]:
            where = f"it is in {found.name}" if found else "no shard has it"
            raise CheckpointError(f"{index}: {name!r} is not in {shard!r}: {where}")
    if unlisted := [name for name in file_of if name not in shard_of]:
        raise CheckpointError(
            f"{index}: leaves out {len(unlisted)} tensor(s) of its shards, such as {unlisted[0]!r} in"
            f" {file_of[unlisted[0]].name}",
            hint="download the index again",
        )


def _damaged(shard: Path, error: Exception) -> CheckpointError:
    """What is wrong with a file that safetensors refuses, as far as its first bytes tell."""
    again = "download the file again"
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            head = file.read(1024)
    except OSError as unreadable:
        return CheckpointError(f"{shard}: cannot be read: {unreadable.strerror}", exit_code=EXIT_NO_INPUT)
    if not size:
        return CheckpointError(f"{shard}: empty (0 bytes)", hint=again)
    if _is_lfs_pointer(head):
        return CheckpointError(
            f"{shard}: a git LFS pointer of {size} bytes", hint="run git lfs pull in the folder"
        )
    if head.startswith(b"PK\x03\x04"):
        return CheckpointError(f"{shard}: a zip archive of {size:,} bytes, not safetensors", hint=again)
    if head.lstrip().startswith(b"<") and 0 not in head[:8]:  # a header's length has zeros there
        return CheckpointError(f"{shard}: an HTML page of {size:,} bytes, not safetensors", hint=again)
    expected = _size_by_header(shard)
    if expected is not None and expected != size:
        return CheckpointError(
            f"{shard}: {size:,} bytes, its header asks for {expected:,}: {error}", hint=again
        )
    return CheckpointError(f"{shard}: not a safetensors file ({size:,} bytes): {error}", hint=again)


def _size_by_header(shard: Path) -> int | None:
    """The bytes that a damaged shard should have, for a message only; None if its header does not say."""
    with shard.open("rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        if header_nbytes > 100_000_000:  # safetensors' own limit: this is not a header
            return None
        header = file.read(header_nbytes)
    if len(header) < header_nbytes:
        return 8 + header_nbytes
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return 8 + header_nbytes + end if isinstance(end, int) and 0 <= end < 2**63 else None


def _is_lfs_pointer(head: bytes) -> bool:
    return head.startswith(b"version https://git-lfs")


def _pickle_refused(where: str) -> CheckpointError:
    return CheckpointError(f"{where}: pickle weights are never loaded", hint="get the *.safetensors files")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name longer than the file system takes
        return False
