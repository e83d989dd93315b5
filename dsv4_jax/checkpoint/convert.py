"""An official checkpoint folder to a converted one: layer by layer, and on from there if interrupted."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsv4_jax.checkpoint.converted import (
    AS_THEY_WERE,
    FILES,
    MANIFEST,
    STATE,
    VERSION,
    Sums,
    array_sum,
    file_sums,
    files_below,
    leaf_names,
    name_in_piece,
    pieces,
    sum_of,
)
from dsv4_jax.checkpoint.load import array_reads, check_names, holds_draft, resolve, value_checker
from dsv4_jax.checkpoint.names import Parameter, parameters
from dsv4_jax.checkpoint.progress import progress_bar
from dsv4_jax.checkpoint.reading import Reader
from dsv4_jax.config import Config
from dsv4_jax.distributed import from_first
from dsv4_jax.errors import EXIT_TRY_AGAIN, OutputError
from dsv4_jax.sharding import Rules, check_mesh
from dsv4_jax.weight_files import WeightFiles, check_folder

CHUNK_NBYTES = 2**26  # what a host that needs a part of an array has to read at least

# So what is written has nothing that fills it up.
_BY_EXPERT = Rules(vocab=(), heads=(), o_groups=(), experts=("expert",), expert_hidden=(), shared_hidden=())


def convert(
    folder: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Path:
    """Writes a converted checkpoint (see `converted`), MTP head or draft included where there is one.

    Interrupted, the same call goes on where it was; the result is the same as if it had not been. What is
    written is read back and held against what was read, before it counts as done.

    Args:
      overwrite: remove what `out` holds instead of refusing it.
      mesh: hold a layer's experts on these devices, of several processes too, and not in host memory.
      progress: show a bar on stderr.

    Returns:
      The folder written, as an absolute path.

    Raises:
      CheckpointError, ConfigError: as `checkpoint.load.load`.
      OutputError: `out` holds something else, or cannot be written (73); the disk is full, or another
        conversion is writing there (75); what was read back is not what was written (73).
      MemoryPlanError: the mesh does not divide the experts.
    """
    folder, out = check_folder(folder), Path(out).absolute()
    config = Config.from_pretrained(folder)
    if mesh is not None:
        check_mesh(config, mesh.shape, _BY_EXPERT)
    with WeightFiles.open(folder) as files:
        mtp = holds_draft(config, files)
        check_names(config, files, mtp=mtp, strict=False)
        stored = [resolve(parameter, files) for parameter in parameters(config, mtp=mtp)]
        source = sum_of({info.name: [info.dtype, *info.shape] for info in files.tensors.values()})
        with _as_output_error(out), _State.open(out, source, overwrite=overwrite) as state:
            todo = {name: each for name, each in pieces(stored).items() if not state.holds(name)}
            with progress_bar("converting", _nbytes(todo, files, config), progress) as advance:
                for name, inside in todo.items():
                    arrays = _read(inside, files, config, mesh, advance)
                    state.add(name, _write(out, name, inside, arrays))
            if jax.process_index() == 0:
                _finish(folder, out, config, state)
            from_first(b"finished")  # no process goes on before it is
    return out


def _nbytes(todo: dict[str, list[Parameter]], files: WeightFiles, config: Config) -> int:
    reads = (
        read
        for inside in todo.values()
        for each in inside
        for read in array_reads(each, files, config, None, _BY_EXPERT)
    )
    return sum(read.nbytes for read in reads)


def _read(
    inside: Sequence[Parameter],
    files: WeightFiles,
    config: Config,
    mesh: Mesh | None,
    advance: Callable[[int], None],
) -> Iterator[Any]:
    reads = [read for each in inside for read in array_reads(each, files, config, mesh, _BY_EXPERT)]
    with Reader(files, value_checker(config, "header"), advance) as reader:
        yield from reader.arrays(reads) if mesh else reader.host_arrays(reads)


def _write(out: Path, piece: str, inside: Sequence[Parameter], arrays: Iterator[Any]) -> Sums:
    """Writes a piece; the sums of its arrays, once it is there as it should be."""
    tree = {
        name_in_piece(parameter): {leaf: next(arrays) for leaf in leaf_names(parameter)}
        for parameter in inside
    }
    shutil.rmtree(out / piece, ignore_errors=True)  # what an interrupted conversion left
    with ocp.StandardCheckpointer() as checkpointer:
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_NBYTES), tree)
        checkpointer.save(out / piece, tree, save_args=chunks)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(out / piece, jax.tree.map(_like, tree))
    sums = {}
    for name, leaves in tree.items():
        for leaf, array in leaves.items():
            written, found = (_sum(each) for each in (array, back[name][leaf]))
            if written != found:
                raise OutputError(
                    f"{out / piece}: {name} ({leaf}) was read back with other numbers than were written",
                    hint="is the disk sound? run it again",
                )
            sums[f"{piece}/{name}/{leaf}"] = written
    return sums


def _like(array: Any) -> Any:
    if isinstance(array, jax.Array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    return np.empty(array.shape, array.dtype)


def _sum(array: Any) -> dict[str, Any]:
    """The entry in the manifest of an array that may lie on the devices of several processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return array_sum(np.asarray(array))


def _finish(folder: Path, out: Path, config: Config, state: "_State") -> None:
    """Writes all that is not arrays."""
    raw = json.loads((folder / "config.json").read_text()) | {"expert_dtype": config.expert_dtype}
    _write_json(out / "config.json", raw)
    for name in AS_THEY_WERE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    _write_json(
        out / MANIFEST,
        {"format": "dsv4_jax", "version": VERSION, "arrays": dict(sorted(state.arrays.items()))},
    )
    beside = [name for name in ("config.json", *AS_THEY_WERE, MANIFEST) if (out / name).is_file()]
    files = dict(sorted((state.files | file_sums(out, beside)).items()))
    _write_json(out / FILES, {"files": files, "sha256": sum_of(files)})
    (out / STATE).unlink()


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


class _State:
    """What of a conversion is done: a file with a line for the source, then one for each piece.

    Of several processes the first one keeps it; the others read it before it goes on.
    """

    def __init__(self, out: Path, done: list[dict[str, Any]], file: Any):
        self._out, self._file = out, file
        self._pieces = {line["piece"] for line in done}
        self.arrays: Sums = {name: each for line in done for name, each in line["arrays"].items()}
        self.files: Sums = {name: each for line in done for name, each in line["files"].items()}

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, source: str, *, overwrite: bool) -> Iterator["_State"]:
        """Begins or goes on with a conversion, and keeps others away meanwhile."""
        if jax.process_index():
            yield cls(out, json.loads(from_first(b"")), None)
            return
        path = out / STATE
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is not a folder", hint="name a folder to write")
        if overwrite and out.is_dir():
            for each in out.iterdir():
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not path.exists():
            raise OutputError(f"{out} is not empty", hint="name another folder, or --overwrite it")
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{out} is being written by another conversion",
                    hint="wait for it",
                    exit_code=EXIT_TRY_AGAIN,
                ) from None
            lines = _whole_lines(file)
            begun = {"version": VERSION, "source": source}
            if not lines:
                _append(file, begun)
            elif lines[0] != begun:
                raise OutputError(
                    f"{out} holds the beginning of another conversion",
                    hint="name another folder, or --overwrite it",
                )
            done = [line for line in lines[1:] if _sizes_hold(out, line["files"])]
            from_first(json.dumps(done).encode())
            yield cls(out, done, file)

    def holds(self, piece: str) -> bool:
        """Whether a piece is done."""
        return piece in self._pieces

    def add(self, piece: str, arrays: Sums) -> None:
        """Notes that a piece is done, with the sums of its arrays."""
        if self._file is None:
            return
        files = file_sums(self._out, files_below(self._out, piece))
        self.arrays |= arrays
        self.files |= files
        _append(self._file, {"piece": piece, "arrays": arrays, "files": files})


def _whole_lines(file: Any) -> list[dict[str, Any]]:
    """The lines of a state; one that was torn off is cut away."""
    file.seek(0)
    text = file.read()
    whole = text.rfind("\n") + 1
    file.truncate(len(text[:whole].encode()))
    return [json.loads(line) for line in text[:whole].splitlines()]


def _append(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _sizes_hold(out: Path, files: Sums) -> bool:
    return all(
        (out / name).is_file() and (out / name).stat().st_size == each["nbytes"]
        for name, each in files.items()
    )


@contextlib.contextmanager
def _as_output_error(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, ValueError) and "ENOSPC" not in str(error) and "No space" not in str(error):
            raise
        full = number in (None, errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{out} cannot be written: {getattr(error, 'strerror', None) or 'the disk is full'}",
            hint="make room and run the same command again: it goes on from there"
            if full
            else "name a folder that can be written",
            exit_code=EXIT_TRY_AGAIN if full else None,
        ) from error
