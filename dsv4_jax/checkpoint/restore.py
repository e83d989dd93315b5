"""A converted checkpoint to parameters on the device, or on any mesh, whatever it was written from."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv4_jax.checkpoint.converted import (
    MANIFEST,
    as_declared,
    leaf_names,
    name_in_piece,
    pieces,
    read_manifest,
    verify_files,
)
from dsv4_jax.checkpoint.layouts import assemble
from dsv4_jax.checkpoint.names import Parameter, parameters
from dsv4_jax.checkpoint.progress import progress_bar
from dsv4_jax.config import Config
from dsv4_jax.errors import EXIT_NO_INPUT, CheckpointError, NumericError
from dsv4_jax.model import Params
from dsv4_jax.sharding import Placement, Rules, placements


def restore(
    folder: Path,
    config: Config,
    *,
    mtp: bool,
    mesh: Mesh | None,
    rules: Rules,
    verify: str,
    progress: bool,
) -> tuple[Params, Params | None, int]:
    """The parameters of the model and of its MTP head, and how many bytes this process read for them.

    Arguments are those of `load`.

    Raises:
      CheckpointError: something is absent, damaged, or of another dtype or shape than the model needs.
      NumericError: `verify="values"` found a number that is not finite.
    """
    if not (folder / MANIFEST).exists() and verify != "full":
        warnings.warn(f"{folder}: has no {MANIFEST}: nothing tells whether it is whole", stacklevel=3)
    else:
        read_manifest(folder)
    if verify == "full":
        verify_files(folder)
    wanted = parameters(config, mtp=mtp)
    if mtp and config.draft != "mtp":
        raise CheckpointError(f"{folder}: holds no MTP head", hint="load it without MTP")
    absent = [piece for piece in pieces(wanted) if not (folder / piece).is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(absent[:3])}",
            hint="copy or convert it again",
            exit_code=EXIT_NO_INPUT,
        )
    with ocp.StandardCheckpointer() as checkpointer:
        stored = [
            each
            for piece, inside in pieces(wanted).items()
            for each in _stored(checkpointer, folder, piece, inside)
        ]
        placed = [place for each in stored for place in _placements(config, mesh, rules, each)]
        nbytes = sum(_nbytes(place, leaf) for place, leaf in placed)
        with progress_bar("restoring", nbytes, progress and jax.process_index() == 0) as advance:
            arrays = _arrays(checkpointer, folder, config, mesh, rules, stored, verify, advance)
            return *assemble(config, stored, arrays, mesh, rules), nbytes


def _stored(
    checkpointer: ocp.StandardCheckpointer, folder: Path, piece: str, inside: list[Parameter]
) -> Iterator[Parameter]:
    """The parameters of a piece in the formats that they were written in."""
    try:
        metadata: Any = checkpointer.metadata(folder / piece).item_metadata
        tree = metadata.tree
    except Exception as error:  # whatever orbax and what is below it raise on a damaged file
        raise CheckpointError(f"{folder / piece}: cannot be read: {_first_line(error)}") from error
    for parameter in inside:
        leaves = tree.get(name_in_piece(parameter))
        if leaves is None:
            raise CheckpointError(f"{folder / piece}: lacks {name_in_piece(parameter)}")
        found = {name: {"dtype": str(each.dtype), "shape": each.shape} for name, each in leaves.items()}
        yield as_declared(parameter, found, folder / piece)


def _arrays(
    checkpointer: ocp.StandardCheckpointer,
    folder: Path,
    config: Config,
    mesh: Mesh | None,
    rules: Rules,
    stored: list[Parameter],
    verify: str,
    advance: Callable[[int], None],
) -> Iterator[jax.Array]:
    """The arrays of all parameters, where they are to lie."""
    for piece, inside in pieces(stored).items():
        targets = {
            name_in_piece(each): {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_reading(place))
                for name, (place, leaf) in zip(
                    leaf_names(each), _placements(config, mesh, rules, each), strict=True
                )
            }
            for each in inside
        }
        try:
            found = checkpointer.restore(folder / piece, targets)
        except Exception as error:
            raise CheckpointError(
                f"{folder / piece}: cannot be restored: {_first_line(error)}",
                hint="`--verify full` tells which file is damaged",
            ) from error
        for each in inside:
            arrays = found.pop(name_in_piece(each))
            for name, (place, leaf) in zip(
                leaf_names(each), _placements(config, mesh, rules, each), strict=True
            ):
                array = arrays.pop(name)
                if verify == "values":
                    _check_values(folder / piece, each, name, array)
                advance(_nbytes(place, leaf))
                yield _mover(place)(array)


def _placements(
    config: Config, mesh: Mesh | None, rules: Rules, parameter: Parameter
) -> list[tuple[Placement, jax.ShapeDtypeStruct]]:
    """Where each leaf of a parameter is to lie, and the leaf."""
    leaves = jax.tree.leaves(parameter.value)
    if mesh is None:
        one: Any = SingleDeviceSharding(jax.local_devices()[0])
        return [(Placement(leaf.shape, one, leaf.shape), leaf) for leaf in leaves]
    places = placements(config, mesh, rules, parameter.axes, parameter.value)
    found = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
    return list(zip(found, leaves, strict=True))


def _reading(place: Placement) -> Sharding:
    """Where an array lies while it is read: a dimension that is to be filled up is whole till then."""
    if not isinstance(place.sharding, NamedSharding) or place.shape == place.stored:
        return place.sharding
    kept = [
        axis if size == stored else None
        for axis, size, stored in zip(place.sharding.spec, place.shape, place.stored, strict=True)
    ]
    return NamedSharding(place.sharding.mesh, PartitionSpec(*kept))


@functools.cache
def _mover(place: Placement) -> Callable[[jax.Array], jax.Array]:
    """From where an array was read to where it is to lie."""
    if place.shape == place.stored:
        return lambda array: array

    def move(array: jax.Array) -> jax.Array:
        if place.pieces > 1:  # see Placement.source
            rows = place.shape[0] // place.sharding.num_devices
            array = array.reshape(-1, rows, place.pieces, place.shape[1])
            return array.swapaxes(1, 2).reshape(place.shape)
        return jnp.pad(
            array, [(0, size - stored) for size, stored in zip(place.shape, array.shape, strict=True)]
        )

    return jax.jit(move, out_shardings=place.sharding)


def _nbytes(place: Placement, leaf: jax.ShapeDtypeStruct) -> int:
    """What this process reads of an array: each of its parts once."""
    parts = {
        tuple(range(size)[each] for size, each in zip(leaf.shape, index, strict=True))
        for index in _reading(place).addressable_devices_indices_map(leaf.shape).values()
        if index is not None
    }
    return sum(math.prod(map(len, part)) for part in parts) * leaf.dtype.itemsize


def _check_values(where: Path, parameter: Parameter, name: str, array: jax.Array) -> None:
    if array.dtype == jnp.uint8 and name == "scale":
        sound = (array != 0xFF).all()
    elif jnp.issubdtype(array.dtype, jnp.floating):
        sound = jnp.isfinite(array.astype(jnp.float32)).all()
    else:
        return
    if not sound:
        raise NumericError(
            f"{where}: {name_in_piece(parameter)} holds values that are not finite numbers",
            hint="convert it again from a sound checkpoint",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
