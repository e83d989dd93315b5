"""Tensors of a checkpoint folder to arrays on the devices of this process: no byte more than these need.

Reading is ahead of placing by a bounded number of bytes. A tensor is read in ranges of whole rows, once, and
each range goes to all devices that need some of it. Where this process has only some of the columns, reading
rows and dropping the rest would be a waste, and reading pieces of rows slow: processes then read different
rows, and the devices exchange columns.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.sharding import Placement
from dsv4_jax.weight_files import TensorInfo, WeightFiles

READ_THREADS = 8
READ_AHEAD = 2**28  # bytes on the host at a time, or one array, if that is more
READ_AT_ONCE = 2**24  # bytes; large tensors are shared out among the threads
_ALIGNMENT = 64  # bytes; a host array that begins at a multiple of it becomes a CPU array without a copy

Check = Callable[[TensorInfo, np.ndarray], None]
Part = tuple[range, ...]  # which tensors of a stack, and which of their rows, columns...


@dataclasses.dataclass(frozen=True)
class ArrayRead:
    """An array to read: tensors of one shape, or a stack of them, and where it is to lie.

    Attributes:
      tensors: one, or all of the stack.
      stacked: whether the array's first axis runs over `tensors`.
      dtype: of the array: as wide as that of the tensors, except for I64, which becomes int32.
      placement: where it lies.
    """

    tensors: Sequence[TensorInfo]
    stacked: bool
    dtype: Any
    placement: Placement

    @functools.cached_property
    def parts(self) -> dict[Part, Part]:
        """By the part that a device of this process has: what of the tensors fills the beginning of it."""
        placement = self._reading
        indices = placement.sharding.addressable_devices_indices_map(placement.shape).values()
        found = {}
        for index in indices:
            assert index is not None  # only asked of devices that hold something
            own = tuple(range(size)[each] for size, each in zip(placement.shape, index, strict=True))
            source = placement.source(index)
            found[own] = source if self.stacked else (range(1), *source)
        return found

    @functools.cached_property
    def jobs(self) -> list[tuple[int, range]]:
        """Which tensor and which rows of it to read at once; all that the parts need, and each row once."""
        needed: dict[int, set[range]] = collections.defaultdict(set)
        for numbers, rows, *_ in self.parts.values():
            for number in numbers:
                needed[number].add(rows)
        return [
            (number, piece)
            for number in sorted(needed)
            for rows in _joined(needed[number])
            for piece in self._pieces(number, rows)
        ]

    @property
    def nbytes(self) -> int:
        """What there is to read for it."""
        return sum(len(rows) * self._row_nbytes(number) for number, rows in self.jobs)

    @property
    def host_nbytes(self) -> int:
        """What its parts take on the host."""
        return sum(math.prod(map(len, part)) for part in self.parts) * np.dtype(self.dtype).itemsize

    def arrange(self, array: jax.Array) -> jax.Array:
        """The array as it was read, where it is to lie."""
        placement = self.placement
        if self._reading is placement:
            return array
        return _filler(array.shape, placement.shape, placement.sharding)(array)

    @functools.cached_property
    def _reading(self) -> Placement:
        """Where the array lies while it is read: in other rows, if only some of its columns were of use."""
        placement, sharding = self.placement, self.placement.sharding
        several = isinstance(sharding, NamedSharding) and jax.process_count() > 1
        if not several or placement.pieces > 1 or len(placement.shape) == 1:
            return placement
        *outer, rows, columns = sharding.spec
        if columns is None or rows is not None:
            return placement
        columns_of: dict[int, set[range]] = collections.defaultdict(set)  # by process, for all decide alike
        for device, index in sharding.devices_indices_map(placement.shape).items():
            columns_of[device.process_index].add(range(placement.shape[-1])[index[-1]])
        whole = all(sum(map(len, each)) == placement.shape[-1] for each in columns_of.values())
        names = (columns,) if isinstance(columns, str) else columns
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        if whole or placement.stored[-2] % ways:
            return placement
        by_row = NamedSharding(sharding.mesh, PartitionSpec(*outer, columns, None))
        return Placement(placement.stored, by_row, placement.stored)

    def _row_nbytes(self, number: int) -> int:
        info = self.tensors[number]
        return info.nbytes // info.shape[0]

    def _pieces(self, number: int, rows: range) -> Iterator[range]:
        step = max(1, READ_AT_ONCE // self._row_nbytes(number))
        return (rows[start : start + step] for start in range(0, len(rows), step))


@functools.cache
def _filler(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> Callable[..., Any]:
    """Arrays of a shape to a larger one with zeros at the end, laid out anew."""
    fill = [(0, wide - size) for wide, size in zip(whole, shape, strict=True)]
    return jax.jit(lambda array: jnp.pad(array, fill), out_shardings=sharding)


def _joined(ranges: set[range]) -> Iterator[range]:
    """The same numbers in as few ranges as there can be, in order."""
    ordered = sorted((each for each in ranges if each), key=lambda each: each.start)
    while ordered:
        first, *ordered = ordered
        while ordered and ordered[0].start <= first.stop:
            first = range(first.start, max(first.stop, ordered.pop(0).stop))
        yield first


class Reader:
    """Reads arrays in the order in which they are asked for, some of them ahead.

    Args:
      check: looks at each piece of a tensor that is read, and raises what is wrong with it.
      advance: is told of every byte read.
    """

    def __init__(self, files: WeightFiles, check: Check, advance: Callable[[int], None]):
        self._files, self._check, self._advance = files, check, advance
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def arrays(self, wanted: Sequence[ArrayRead]) -> Iterator[jax.Array]:
        """The arrays, each where it is to lie.

        Raises:
          CheckpointError: a file cannot be read to its end.
        """
        return (filling.finish() for filling in self._filled(wanted))

    def host_arrays(self, wanted: Sequence[ArrayRead]) -> Iterator[np.ndarray]:
        """As `arrays`, whole and on the host."""
        return (filling.on_host() for filling in self._filled(wanted))

    def _filled(self, wanted: Sequence[ArrayRead]) -> "Iterator[_Filling]":
        under_way: collections.deque[_Filling] = collections.deque()
        for array in wanted:
            held = sum(each.array.host_nbytes for each in under_way)
            while under_way and held + array.host_nbytes > READ_AHEAD:
                held -= under_way[0].array.host_nbytes
                yield under_way.popleft()
            under_way.append(self._start(array))
        while under_way:
            yield under_way.popleft()

    def _start(self, array: ArrayRead) -> "_Filling":
        buffers = {}
        for part, source in array.parts.items():
            shape = tuple(map(len, part if array.stacked else (range(1), *part)))
            filled = shape == tuple(map(len, source))
            buffers[part] = _aligned_empty(shape, array.dtype)
            if not filled:
                buffers[part][...] = 0
        jobs = [self._pool.submit(self._fill, array, buffers, *job) for job in array.jobs]
        return _Filling(array, buffers, jobs)

    def _fill(self, array: ArrayRead, buffers: dict[Part, np.ndarray], number: int, rows: range) -> None:
        """Puts these rows of a tensor where they are needed."""
        places = []
        for part, (numbers, own, *columns) in array.parts.items():
            shared = range(max(rows.start, own.start), min(rows.stop, own.stop))
            if number in numbers and shared:
                of_tensor = buffers[part][number - numbers.start]
                place = of_tensor[shared.start - own.start : shared.stop - own.start]
                places.append((place, shared, columns))
        self._read(array.tensors[number], rows, places)
        self._advance(len(rows) * array._row_nbytes(number))

    def _read(
        self, info: TensorInfo, rows: range, places: list[tuple[np.ndarray, range, list[range]]]
    ) -> None:
        """Fills the beginning of arrays, each with those rows and columns of a tensor that go with it.

        Bytes are reinterpreted, never cast, but for I64 tables: JAX would cut those to int32 without a word.
        """
        whole = [range(size) for size in info.shape[1:]]
        as_stored = all(out.shape[1:] == info.shape[1:] and columns == whole for out, _, columns in places)
        if as_stored and info.dtype != "I64":
            for out, own, _ in places:
                self._check(info, self._files.read(info.name, own.start, len(own), out))
            return
        read = self._files.read(info.name, rows.start, len(rows))
        self._check(info, read)
        for out, own, columns in places:
            slices = (slice(own.start - rows.start, own.stop - rows.start), *map(_as_slice, columns))
            found = read[slices]
            out[tuple(map(slice, found.shape))] = found if info.dtype == "I64" else found.view(out.dtype)


@dataclasses.dataclass(frozen=True)
class _Filling:
    """An array whose parts are being read."""

    array: ArrayRead
    buffers: dict[Part, np.ndarray]
    jobs: list[Future[None]]

    def on_host(self) -> np.ndarray:
        """The whole array, once all is read."""
        for job in self.jobs:
            job.result()
        (buffer,) = self.buffers.values()
        return buffer if self.array.stacked else buffer[0]

    def finish(self) -> jax.Array:
        """The array on its devices, once all is read."""
        for job in self.jobs:
            job.result()
        placement = self.array._reading

        def part(index: tuple[slice, ...]) -> np.ndarray:
            own = tuple(range(size)[each] for size, each in zip(placement.shape, index, strict=True))
            return self.buffers[own] if self.array.stacked else self.buffers[own][0]

        found = jax.make_array_from_callback(placement.shape, placement.sharding, part)  # type: ignore[arg-type]
        arranged = self.array.arrange(found)
        arranged.block_until_ready()  # the host copy may go before more is read
        return arranged


def _as_slice(bounds: range) -> slice:
    return slice(bounds.start, bounds.stop)


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)
