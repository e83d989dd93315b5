"""An official checkpoint folder to parameters on the device, or on a mesh of them."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from dsv4_jax.checkpoint.converted import check_finished, is_converted
from dsv4_jax.checkpoint.layouts import assemble
from dsv4_jax.checkpoint.names import Parameter, is_shared_copy, parameters
from dsv4_jax.checkpoint.progress import progress_bar
from dsv4_jax.checkpoint.reading import ArrayRead, Check, Reader
from dsv4_jax.checkpoint.restore import restore
from dsv4_jax.config import Config
from dsv4_jax.errors import CheckpointError, NumericError
from dsv4_jax.model import Params
from dsv4_jax.sharding import (
    DEFAULT_RULES,
    RULES,
    Placement,
    Rules,
    check_mesh,
    find_rules,
    placements,
)
from dsv4_jax.weight_files import TensorInfo, WeightFiles
from pallas_kernels import QuantArray

Verify = Literal["header", "values", "full"]


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
      rules: how they lie there.
      nbytes_read: what this process read from the files.
    """

    config: Config
    params: Params
    mtp_params: Params | None
    mesh: Mesh | None
    rules: Rules = RULES[DEFAULT_RULES]
    nbytes_read: int = 0


def load(
    folder: str | Path,
    *,
    mtp: bool = False,
    mesh: Mesh | None = None,
    rules: Rules | str = DEFAULT_RULES,
    verify: Verify = "header",
    strict: bool = False,
    progress: bool = False,
) -> LoadedModel:
    """Reads a checkpoint in the official DeepSeek-V4 format, or one that `convert` wrote.

    Numbers stay as they are stored: FP4 packed, FP8, E8M0 scales as exponents. Reads no byte twice, and on
    several hosts none that the devices of this one do not need; how much is on the host at a time is bounded.

    Args:
      mtp: also load the MTP head.
      mesh: spread the parameters over these devices.
      rules: how, a table of `sharding.RULES` or its name.
      verify: "values" also looks for NaN and infinities in everything read; "full" holds every byte of a
        converted checkpoint against its sums first.
      strict: refuse tensors that the model has no place for; otherwise they are a CheckpointWarning.
      progress: show a bar on stderr.

    Raises:
      CheckpointError: the folder, a file or a tensor is absent or not what it should be.
      ConfigError: its config.json does not describe a model that this package runs.
      NumericError: `verify="values"` found a number that is not finite.
      MemoryPlanError: the mesh does not divide the model.
    """
    if is_converted(folder):
        check_finished(Path(folder))
    config, rules = Config.from_pretrained(folder), find_rules(rules)
    if mesh is not None:
        check_mesh(config, mesh.shape, rules)
    if is_converted(folder):
        params, mtp_params, nbytes = restore(
            Path(folder), config, mtp=mtp, mesh=mesh, rules=rules, verify=verify, progress=progress
        )
        return LoadedModel(config, params, mtp_params, mesh, rules, nbytes)
    if verify == "full":
        raise CheckpointError(
            f"{folder}: has no sums to verify it by", hint="only a checkpoint that was converted has"
        )
    with WeightFiles.open(folder) as files:
        check_draft(config, files, mtp=mtp)
        check_names(config, files, mtp=mtp, strict=strict)
        stored = [resolve(parameter, files) for parameter in parameters(config, mtp=mtp)]
        reads = [array_reads(parameter, files, config, mesh, rules) for parameter in stored]
        wanted = [read for each in reads for read in each]
        nbytes = sum(read.nbytes for read in wanted)
        with (
            progress_bar("loading", nbytes, progress and jax.process_index() == 0) as advance,
            Reader(files, value_checker(config, verify), advance) as reader,
        ):
            params, mtp_params = assemble(config, stored, reader.arrays(wanted), mesh, rules)
    return LoadedModel(config, params, mtp_params, mesh, rules, nbytes)


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


def check_names(config: Config, files: WeightFiles, *, mtp: bool, strict: bool) -> None:
    """Refuses a folder that lacks tensors of the model, and warns of those that it has no place for.

    Raises:
      CheckpointError: tensors are missing or, if `strict`, unexpected.
    """
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


def array_reads(
    parameter: Parameter, files: WeightFiles, config: Config, mesh: Mesh | None, rules: Rules
) -> list[ArrayRead]:
    """What there is to read of a parameter `as_stored`, in the order of its leaves."""
    value, stems = parameter.value, parameter.stems()
    if mesh is None:
        one: Any = SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda leaf: Placement(leaf.shape, one, leaf.shape), value)
    else:
        places = placements(config, mesh, rules, parameter.axes, value)
    suffixes = ("",) if parameter.entry.stored != "quantized" else (".weight", ".scale")
    leaves = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
    return [
        ArrayRead([files.tensors[stem + suffix] for stem in stems], parameter.stacked, leaf.dtype, place)
        for suffix, leaf, place in zip(suffixes, jax.tree.leaves(value), leaves, strict=False)
    ]


def value_checker(config: Config, verify: Verify) -> Check:
    """What looks at each piece of a tensor that is read."""

    def check(info: TensorInfo, tensor: np.ndarray) -> None:
        if info.dtype == "I64":
            _check_expert_ids(info, tensor, config.n_routed_experts)
        elif verify == "values":
            _check_finite(info, tensor)

    return check


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
