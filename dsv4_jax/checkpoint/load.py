"""An official checkpoint folder to parameters on the device, or on a mesh of them."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dsv4_jax.checkpoint.names import Parameter, is_ignored, nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.errors import CheckpointError, NumericError
from dsv4_jax.model import Params
from dsv4_jax.sharding import check_mesh, parameter_sharding
from dsv4_jax.weight_files import TensorInfo, WeightFiles
from pallas_kernels import QuantArray
from pallas_kernels.formats import E8M0_NAN

READ_THREADS = 8

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
    than the parameter that is being placed.

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
        with _progress_bar(nbytes, progress) as advance, ThreadPoolExecutor(READ_THREADS) as pool:
            for parameter in stored:
                reader = _Reader(files, parameter, config, verify, pool, advance)
                leaves[parameter.path] = reader.place(mesh)
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
    if not holds_mtp(config, files):
        raise CheckpointError(f"{files.folder}: holds no MTP weights (mtp.0.*)", hint="load it without MTP")


def holds_mtp(config: Config, files: WeightFiles) -> bool:
    """Whether the folder has weights of an MTP head."""
    return config.draft == "mtp" and any(name.startswith("mtp.0.") for name in files.tensors)


def missing_and_unexpected(config: Config, files: WeightFiles, *, mtp: bool) -> tuple[list[str], list[str]]:
    """Tensors that the model, with `mtp` its head too, needs and the folder lacks; and those without a place.

    An MTP head that is there but not asked for is neither.
    """
    missing, expected = [], set()
    for parameter in parameters(config, mtp=mtp):
        for stem in parameter.stems():
            names = _names(parameter, stem)
            expected.update(names)
            needed = names[:1] if _is_unquantised(files, names) else names
            missing += [name for name in needed if name not in files.tensors]
    if not mtp and holds_mtp(config, files):
        expected.update(name for name in files.tensors if name.startswith("mtp."))
    unexpected = [name for name in files.tensors if name not in expected and not is_ignored(config, name)]
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


def resolve(parameter: Parameter, files: WeightFiles) -> Parameter:
    """The parameter as this folder stores it, every tensor of it checked.

    A linear stored in bfloat16 without a scale is loaded unquantised; scales may be E8M0 or float32.

    Raises:
      CheckpointError: a tensor is absent, or has another dtype or shape.
    """
    if isinstance(parameter.value, QuantArray):
        parameter = _as_stored(parameter, files)
    for name, dtype, shape in parameter.tensors():
        info = files.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{files.folder}: lacks {name}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    return parameter


def _as_stored(parameter: Parameter, files: WeightFiles) -> Parameter:
    """`parameter` with the format and scale dtype of its first tensor."""
    names = _names(parameter, parameter.stems()[0])
    if _is_unquantised(files, names):
        return parameter._replace(value=jax.ShapeDtypeStruct(parameter.value.shape, jnp.bfloat16))
    found = files.tensors.get(names[1])
    dtype = {"F8_E8M0": jnp.uint8, "F32": jnp.float32}.get(found.dtype) if found else None
    if dtype is None:
        return parameter  # what is wrong with it shows when it is checked
    scale_value = jax.ShapeDtypeStruct(parameter.value.scale.shape, dtype)
    return parameter._replace(value=dataclasses.replace(parameter.value, scale=scale_value))


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
            return dataclasses.replace(value, values=values, scale=scale)
        suffix = ".weight" if self.parameter.entry.stored == "quantized" else ""
        return self._array([stem + suffix for stem in stems], value, shardings)

    def _array(self, names: list[str], value: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        read: dict[str, np.ndarray] = {}  # devices that share a slice read it once

        def slice_for_device(index: tuple[slice, ...]) -> np.ndarray:
            key = str(index)
            if key not in read:
                read[key] = self._read(names, value, index)
            return read[key]

        array = jax.make_array_from_callback(value.shape, sharding, slice_for_device)
        array.block_until_ready()  # the host copy may go before the next one comes
        return array

    def _read(self, names: list[str], value: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a parameter that `index` names, stacked over experts if it is a stack."""
        if not self.parameter.stacked:
            return np.ascontiguousarray(self._tensor(names[0], value.dtype)[index])
        chosen, inner = names[index[0]], index[1:]
        shape = np.broadcast_to(np.empty((), np.uint8), value.shape[1:])[inner].shape
        out = np.empty((len(chosen), *shape), value.dtype)

        def fill(slot: int) -> None:
            whole = shape == value.shape[1:]
            tensor = self._tensor(chosen[slot], value.dtype, out[slot] if whole else None)
            if not whole:
                out[slot] = tensor[inner]

        list(self.pool.map(fill, range(len(chosen))))
        return out

    def _tensor(self, name: str, dtype, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor in the dtype of its parameter: bytes reinterpreted, never cast, but for I64 tables."""
        info = self.files.tensors[name]
        tensor = self.files.read(name, out=out)
        self.advance(info.nbytes)
        if info.dtype == "I64":
            return self._expert_ids(info, tensor)
        if self.verify == "values":
            _check_finite(info, tensor)
        return tensor.view(dtype)

    def _expert_ids(self, info: TensorInfo, table: np.ndarray) -> np.ndarray:
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= self.config.n_routed_experts:
            raise CheckpointError(
                f"{info.file}: {info.name} names experts {low} to {high},"
                f" the model has {self.config.n_routed_experts}"
            )
        return table.astype(np.int32)


def _check_finite(info: TensorInfo, tensor: np.ndarray) -> None:
    if info.dtype == "I8":
        return  # every FP4 code is a number
    if info.dtype == "F8_E8M0":
        bad = np.count_nonzero(tensor.view(np.uint8) == E8M0_NAN)
    elif info.dtype == "F8_E4M3":
        bad = np.count_nonzero((tensor.view(np.uint8) & 0x7F) == 0x7F)
    else:
        wide = tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor
        bad = wide.size - np.count_nonzero(np.isfinite(wide))
    if bad:
        raise NumericError(
            f"{info.file}: {info.name} holds {bad} values that are not finite numbers",
            hint="download the file again",
        )


@contextmanager
def _progress_bar(nbytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar by bytes on stderr, or nothing; gives a function that moves it on."""
    if not shown:
        yield lambda nbytes: None
        return
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
