"""An official checkpoint folder to parameters on the device, or on a mesh of them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dsv4_jax.checkpoint.layouts import lay_out
from dsv4_jax.checkpoint.names import Parameter, is_shared_copy, nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.errors import CheckpointError, NumericError
from dsv4_jax.model import Params
from dsv4_jax.sharding import check_mesh, parameter_sharding
from dsv4_jax.weight_files import TensorInfo, WeightFiles
from pallas_kernels import QuantArray, current_target
from pallas_kernels.fnuz import for_target

READ_THREADS = 8
_ALIGNMENT = 64  # bytes; a host array that begins at a multiple of it becomes a CPU array without a copy
_READ_AT_ONCE = 2**24  # bytes; large tensors are shared out among the threads

Verify = Literal["header", "values"]


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that is left aside."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
      config: as in the folder's config.json.
      params: of `model.Transformer`.
      mtp_params: of `mtp.MTPHead`; None if not asked for.
      mesh: over which the parameters lie; None for one device.
    """

    config: Config
    params: Params
    mtp_params: Params | None
    mesh: Mesh | None


def load(
    folder: str | Path,
    *,
    mtp: bool = False,
    mesh: Mesh | None = None,
    verify: Verify = "header",
    strict: bool = False,
    progress: bool = False,
) -> LoadedModel:
    """Reads a checkpoint in the official DeepSeek-V4 format.

    Numbers stay as they are stored: FP4 packed, FP8, E8M0 scales as exponents. Never holds more on the host
    than the parameter that is being placed, and reads no tensor twice.

    Args:
      mtp: also load the MTP head.
      mesh: spread the parameters over these devices by `sharding.RULES`.
      verify: "values" also looks for NaN and infinities in everything read.
      strict: refuse tensors that the model has no place for; otherwise they are a CheckpointWarning.
      progress: show a bar on stderr.

    Raises:
      CheckpointError: the folder, a file or a tensor is absent or not what it should be.
      ConfigError: its config.json does not describe a model that this package runs.
      NumericError: `verify="values"` found a number that is not finite.
      MemoryPlanError: the mesh does not divide the model.
    """
    config = Config.from_pretrained(folder)
    if mesh is not None:
        check_mesh(config, mesh.shape)
    with WeightFiles.open(folder) as files:
        check_draft(config, files, mtp=mtp)
        _check_names(config, files, mtp=mtp, strict=strict)
        stored = [resolve(parameter, files) for parameter in parameters(config, mtp=mtp)]
        nbytes = sum(files.tensors[name].nbytes for parameter in stored for name, _, _ in parameter.tensors())
        leaves = {}
        with progress_bar("loading", nbytes, progress) as advance, ThreadPoolExecutor(READ_THREADS) as pool:
            for parameter in stored:
                reader = _Reader(files, parameter, config, verify, pool, advance)
                leaves[parameter.path] = reader.place(mesh)
                if mesh is None:
                    lay_out(leaves, parameter.path, current_target())
    params = nest(leaves)
    heads = params.pop("mtp", None)
    return LoadedModel(config, params, heads[0] if heads else None, mesh)


def check_draft(config: Config, files: WeightFiles, *, mtp: bool) -> None:
    """Says what a checkpoint holds in place of an MTP head, if one is asked for and there is none.

    Raises:
      CheckpointError: there is no MTP head to load.
    """
    if not mtp:
        return
    if config.draft == "dspark":
        raise CheckpointError(
            f"{files.folder}: holds a DSpark draft and no MTP head",
            hint="load it without MTP; the main model is the same",
        )
    if not holds_draft(config, files):
        raise CheckpointError(f"{files.folder}: holds no MTP weights (mtp.0.*)", hint="load it without MTP")


def holds_draft(config: Config, files: WeightFiles) -> bool:
    """Whether the folder has weights of what its config drafts with."""
    drafts = (name for name in files.tensors if name.startswith("mtp.") and not is_shared_copy(name))
    return config.draft is not None and any(drafts)


def missing_and_unexpected(config: Config, files: WeightFiles, *, mtp: bool) -> tuple[list[str], list[str]]:
    """Tensors that the model needs and the folder lacks; and those of the folder that have no place in it.

    `mtp`: the model is to have its MTP head or DSpark draft too. One that is there but not asked for is
    neither missing nor unexpected, nor are copies of the embedding and the head.
    """
    missing, expected = [], set()
    for parameter in parameters(config, mtp=mtp):
        for stem in parameter.stems():
            names = _names(parameter, stem)
            expected.update(names)
            needed = names[:1] if _is_unquantised(files, names) else names
            missing += [name for name in needed if name not in files.tensors]
    left_aside = not mtp and config.draft is not None
    unexpected = [
        name
        for name in files.tensors
        if name not in expected and not is_shared_copy(name) and not (left_aside and name.startswith("mtp."))
    ]
    return missing, unexpected


def _check_names(config: Config, files: WeightFiles, *, mtp: bool, strict: bool) -> None:
    missing, unexpected = missing_and_unexpected(config, files, mtp=mtp)
    if missing:
        raise CheckpointError(
            f"{files.folder}: lacks {_some(missing)}",
            hint="download the whole checkpoint, or see its config.json",
        )
    if unexpected and strict:
        raise CheckpointError(f"{files.folder}: holds {_some(unexpected)}, which the model has no place for")
    if unexpected:
        message = f"{files.folder}: {_some(unexpected)} ignored: the model has no place for them"
        warnings.warn(message, CheckpointWarning, stacklevel=3)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _names(parameter: Parameter, stem: str) -> tuple[str, ...]:
    return (f"{stem}.weight", f"{stem}.scale") if parameter.entry.stored == "quantized" else (stem,)


def _is_unquantised(files: WeightFiles, names: tuple[str, ...]) -> bool:
    """Whether a weight that could be quantised is stored in bfloat16, which it is without a scale."""
    weight, *scale = (files.tensors.get(name) for name in names)
    return weight is not None and weight.dtype == "BF16" and scale == [None]


class Mismatch(NamedTuple):
    """A tensor with another dtype or shape than it needs, both told as in "BF16 [128, 64]"."""

    name: str
    found: str
    expected: str


def mismatches(parameter: Parameter, files: WeightFiles) -> Iterator[Mismatch]:
    """Holds the tensors of a parameter that are there against its declared value."""
    for name, dtype, shape in parameter.tensors():
        info = files.tensors.get(name)
        if info is not None and (info.dtype, info.shape) != (dtype, shape):
            yield Mismatch(name, f"{info.dtype} {list(info.shape)}", f"{dtype} {list(shape)}")


def resolve(parameter: Parameter, files: WeightFiles) -> Parameter:
    """The parameter `as_stored`, once it is sure that all its tensors are alike.

    Raises:
      CheckpointError: a tensor has another dtype or shape.
    """
    parameter = as_stored(parameter, files)
    for name, found, expected in mismatches(parameter, files):
        raise CheckpointError(
            f"{files.tensors[name].file}: {name} is {found}, expected {expected}",
            hint="does config.json belong to these weights?",
        )
    return parameter


def as_stored(parameter: Parameter, files: WeightFiles) -> Parameter:
    """The parameter in the format and with the scale dtype that its first tensor has in this folder.

    A linear stored in bfloat16 without a scale is loaded unquantised; scales may be E8M0 or float32.
    """
    value = parameter.value
    if not isinstance(value, QuantArray):
        return parameter
    names = _names(parameter, parameter.stems()[0])
    if _is_unquantised(files, names):
        return parameter._replace(value=jax.ShapeDtypeStruct(value.shape, jnp.bfloat16))
    found = files.tensors.get(names[1])
    dtype = {"F8_E8M0": jnp.uint8, "F32": jnp.float32}.get(found.dtype) if found else None
    if dtype is None:
        return parameter  # what is wrong with it is for `mismatches` to say
    scale: Any = jax.ShapeDtypeStruct(value.scale.shape, dtype)
    return parameter._replace(value=dataclasses.replace(value, scale=scale))


Part = tuple[range, ...]  # which tensors of a stack, and which of their rows, columns...


class _Reader:
    """Brings one parameter from its files to its devices."""

    def __init__(
        self,
        files: WeightFiles,
        parameter: Parameter,
        config: Config,
        verify: Verify,
        pool: ThreadPoolExecutor,
        advance: Callable[[int], None],
    ):
        self.files, self.parameter, self.config = files, parameter, config
        self.verify, self.pool, self.advance = verify, pool, advance

    def place(self, mesh: Mesh | None) -> jax.Array | QuantArray:
        """The parameter on the device, or spread over the mesh."""
        value, stems = self.parameter.value, self.parameter.stems()
        one = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, value)
        if mesh is not None:
            shardings = parameter_sharding(mesh, self.parameter.axes, value)
        if isinstance(value, QuantArray):
            values = self._array([f"{stem}.weight" for stem in stems], value.values, shardings.values)
            scale = self._array([f"{stem}.scale" for stem in stems], value.scale, shardings.scale)
            placed = dataclasses.replace(value, values=values, scale=scale)
            # Experts are laid out by `prepare_experts`, which starts from the checkpoint's form.
            return placed if self.parameter.stacked else for_target(placed, current_target())
        suffix = ".weight" if self.parameter.entry.stored == "quantized" else ""
        return self._array([stem + suffix for stem in stems], value, shardings)

    def _array(
        self, names: list[str], value: jax.Array | jax.ShapeDtypeStruct, sharding: Sharding
    ) -> jax.Array:
        """Tensors of the same shape as one array, stacked if the parameter is a stack of experts.

        Each is read once, and its numbers go to every part that a device of this process holds.
        """
        stacked = self.parameter.stacked

        def bounds(index: tuple[slice, ...] | None) -> Part:
            assert index is not None  # only asked of devices that hold something
            inner = tuple(range(size)[each] for size, each in zip(value.shape, index, strict=True))
            return inner if stacked else (range(1), *inner)

        held = map(bounds, sharding.addressable_devices_indices_map(value.shape).values())
        parts = {part: _aligned_empty(tuple(map(len, part)), value.dtype) for part in set(held)}

        def fill(job: tuple[int, range]) -> None:
            number, rows = job
            info = self.files.tensors[names[number]]
            places = []
            for (numbers, own, *columns), out in parts.items():
                shared = range(max(rows.start, own.start), min(rows.stop, own.stop))
                if number in numbers and shared:
                    place = out[number - numbers.start, shared.start - own.start : shared.stop - own.start]
                    places.append((place, (shared, *columns)))
            if places:
                self._read(info, rows, places)
            self.advance(info.nbytes // info.shape[0] * len(rows))

        list(self.pool.map(fill, self._jobs(names)))
        array = jax.make_array_from_callback(
            value.shape,
            sharding,
            lambda index: parts[bounds(index)] if stacked else parts[bounds(index)][0],
        )
        array.block_until_ready()  # the host copy may go before the next one comes
        return array

    def _jobs(self, names: list[str]) -> Iterator[tuple[int, range]]:
        """Which tensor and which rows of it to read at once."""
        for number, info in enumerate(self.files.tensors[name] for name in names):
            rows = range(info.shape[0])
            step = max(1, _READ_AT_ONCE * len(rows) // info.nbytes)
            yield from ((number, rows[start : start + step]) for start in rows[::step])

    def _read(self, info: TensorInfo, rows: range, places: list[tuple[np.ndarray, Part]]) -> None:
        """Fills arrays, each with the part of a tensor's `rows` that is given beside it.

        Bytes are reinterpreted, never cast, but for I64 tables: JAX would cut those to int32 without a word.
        """
        whole_rows = all(out.shape[1:] == info.shape[1:] for out, _ in places)
        if whole_rows and info.dtype != "I64":
            for out, (own, *_) in places:
                self._check(info, self.files.read(info.name, own.start, len(own), out))
            return
        read = self.files.read(info.name, rows.start, len(rows))
        self._check(info, read)
        for out, (own, *columns) in places:
            found = read[(slice(own.start - rows.start, own.stop - rows.start), *map(_as_slice, columns))]
            out[...] = found if info.dtype == "I64" else found.view(out.dtype)

    def _check(self, info: TensorInfo, tensor: np.ndarray) -> None:
        if info.dtype == "I64":
            _check_expert_ids(info, tensor, self.config.n_routed_experts)
        elif self.verify == "values":
            _check_finite(info, tensor)


def _as_slice(bounds: range) -> slice:
    return slice(bounds.start, bounds.stop)


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


def _check_expert_ids(info: TensorInfo, table: np.ndarray, experts: int) -> None:
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= experts:
        raise CheckpointError(
            f"{info.file}: {info.name} names experts {low} to {high}, the model has {experts}",
            hint="download the file again",
        )


def _check_finite(info: TensorInfo, tensor: np.ndarray) -> None:
    if info.dtype == "I8":
        return  # every FP4 code is a number
    if not np.isfinite(tensor).all():
        raise NumericError(
            f"{info.file}: {info.name} holds values that are not finite numbers",
            hint="download the file again",
        )


@contextmanager
def progress_bar(label: str, nbytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar by bytes on stderr, or nothing; gives a function that moves it on."""
    if not shown:
        yield lambda nbytes: None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
