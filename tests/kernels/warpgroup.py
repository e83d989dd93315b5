"""A small emulator of threads that run in step, after the PTX manual, for PTX that a test wants computed.

It knows fragments of `wgmma` in E4M3 with the 128-byte swizzle of its second operand, and that nobody may
touch a product before it was waited for; `mma.sync` in bfloat16; `stmatrix`; loops that all threads go
through alike; and what programs of a cluster send each other.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

REMOTE = 24  # bits of an address in shared memory; above stands a program of the cluster, plus one


@dataclasses.dataclass
class Barrier:
    """An mbarrier: a phase is over when so many have arrived and no bytes are awaited."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def told(self, arrivals: int, bytes: int) -> None:
        self.pending -= arrivals
        self.bytes += bytes
        assert self.pending >= 0
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


class Space:
    """A memory with arrays in it, each at a multiple of 1024 bytes.

    At first all its bytes are 0xFF, which stands for not-a-number in every format.
    """

    def __init__(self) -> None:
        self.bytes = np.full(1 << 23, 0xFF, np.uint8)
        self.end = 1024

    def place(self, array: Any) -> int:
        """Its address."""
        data, start = np.ascontiguousarray(array).reshape(-1).view(np.uint8), self.end
        self.bytes[start : start + data.size] = data
        self.end = -(-(start + data.size) // 1024) * 1024
        return start

    def read(self, start: int, like: Any) -> np.ndarray:
        """What lies at an address, as an array of that shape and type."""
        like = np.asarray(like)
        return self.bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


class Cluster:
    """Shared memories of some programs, and the barriers in them."""

    def __init__(self, shared: list[np.ndarray]):
        self.shared = shared
        self.barriers: dict[tuple[int, int], Barrier] = {}


class Warpgroup:
    """Threads in step. A register is an array of one number for each, of a dtype by its use.

    Attributes:
      registers: by name; those of operands begin with $.
      arrived: what `red` counted up: (thread, address, the largest number), in order.
    """

    def __init__(self, shared: np.ndarray | Cluster, memory: np.ndarray, threads: int = 128, rank: int = 0):
        self.cluster = shared if isinstance(shared, Cluster) else Cluster([shared])
        self.memory, self.rank, self.count = memory, rank, threads
        self.registers: dict[str, np.ndarray] = {}
        self.pending: list[dict[str, np.ndarray]] = []  # groups of products under way
        self.issued: dict[str, np.ndarray] = {}
        self.lane = np.arange(threads)
        self.arrived: list[tuple[int, int, int]] = []

    def run(self, text: str, operands: dict[str, np.ndarray]) -> None:
        for _ in self.steps(text, operands):
            raise AssertionError("waits for something that nobody sends")

    def steps(self, text: str, operands: dict[str, np.ndarray]) -> Iterator[None]:
        """Runs until the end; yields where it would wait."""
        self.registers |= {f"${name}": value for name, value in operands.items()}
        lines, labels = [], {}
        for line in re.sub(r"(?m)^([A-Z]+):", r"\1:;", text).split(";"):
            if match := re.fullmatch(r"\s*(\w+):\s*", line):
                labels[match[1]] = len(lines)
            elif line.strip():
                lines.append(line.strip())
        place = 0
        while place < len(lines):
            match = re.fullmatch(r"@(!?)(\w+) bra (\w+)", lines[place])
            place += 1
            if not match:
                self._step(lines[place - 1])
                continue
            taken = self.registers[match[2]] ^ (match[1] == "!")
            assert taken.all() or not taken.any(), "threads part"
            if taken.all():
                place = labels[match[3]]
                if lines[place].startswith("mbarrier.try_wait"):
                    yield
        assert not self.pending
        assert not self.issued

    def read(self, name: str, kind: Any = np.uint32) -> np.ndarray:
        if name == "%cluster_ctarank":
            return np.full(self.count, self.rank, np.uint32)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            return np.full(self.count, int(name, 0) % (1 << 8 * np.dtype(kind).itemsize), kind)
        if name.startswith("0f"):
            return np.full(self.count, int(name[2:], 16), np.uint32).view(np.float32)
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        value = self.registers[name]
        return value.view(kind) if value.dtype.itemsize == np.dtype(kind).itemsize else value.astype(kind)

    def _write(self, name: str, value: np.ndarray) -> None:
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        self.registers[name] = value

    def _step(self, line: str) -> None:
        real = np.ones(self.count, bool)
        if match := re.match(r"@(\w+) (.*)", line, re.DOTALL):
            real, line = self.registers[match[1]], match[2]
        name, _, rest = line.partition(" ")
        vectors = re.findall(r"\{([^}]*)\}|\[([^]]*)\]|([^,\s{}\[\]]+)", rest)
        arguments = ["{" + a if a else "[" + b if b else c for a, b, c in vectors]
        if name.startswith((".reg", "bar.", "barrier.cluster", "fence")):
            return
        if name.startswith("wgmma"):
            self._tensor(name, arguments)
        elif name.startswith("mma.sync"):
            self._product_of_warps(arguments)
        elif name.startswith(("mbarrier", "st.async", "cp.async.bulk")):
            self._tell(name, arguments, real)
        elif name.startswith(("ld.", "st.")):
            self._move(name, arguments, real)
        elif name.startswith("stmatrix"):
            self._store_matrices(name, arguments)
        elif name == "red.release.gpu.global.inc.u32":
            at, most = self._addresses(arguments[0]), int(arguments[1])
            self.arrived += [(int(thread), int(at[thread]), most) for thread in np.flatnonzero(real)]
        else:
            assert real.all()
            self._compute(name, arguments)

    def _compute(self, name: str, arguments: list[str]) -> None:
        target, *sources = arguments
        operation, *kinds = name.split(".")
        kind = KINDS.get(kinds[-1], np.uint32)
        if operation == "mov" and "{" in target + sources[0]:
            return self._repack(kinds[-1], target, sources[0])
        if operation == "cvt":
            return self._convert(kinds, target, sources)
        if operation in ("and", "not") and kinds == ["pred"]:
            values = [self.registers[each] for each in sources]
            return self._write(target, values[0] & values[1] if operation == "and" else ~values[0])
        if operation == "selp":
            first, second = (self.read(each, kind) for each in sources[:2])
            return self._write(target, np.where(self.registers[sources[2]], first, second))
        if operation == "setp":
            found = COMPARISONS[kinds[0]](*(self.read(each, kind) for each in sources[:2]))
            return self._write(target, found & self.registers[sources[2]] if kinds[1] == "and" else found)
        if operation == "shfl":
            other = self.read(sources[1]).astype(np.int64)
            other = self.lane ^ other if kinds[1] == "bfly" else self.lane // 32 * 32 + other
            return self._write(target, self.read(sources[0])[other])
        if operation == "mapa":
            return self._write(target, self.read(sources[0]) | self.read(sources[1]) + 1 << REMOTE)
        if name == "mul.wide.u32":
            first, second = (self.read(each).astype(np.uint64) for each in sources)
            return self._write(target, first * second)
        values = [self.read(each, kind) for each in sources]
        with np.errstate(all="ignore"):
            self._write(target, OPERATIONS[name if name in OPERATIONS else operation](*values))

    def _repack(self, kind: str, target: str, source: str) -> None:
        """`mov` of two registers to one twice as wide, or back."""
        narrow, wide = {"b64": (np.uint32, np.uint64), "b32": (np.uint16, np.uint32)}[kind]
        bits = wide(8 * np.dtype(narrow).itemsize)
        if source.startswith("{"):
            low, high = (self.read(each, narrow).astype(wide) for each in _names(source))
            return self._write(target, low | high << bits)
        value = self.read(source, wide)
        for name, part in zip(_names(target), (value, value >> bits), strict=True):
            self._write(name, part.astype(narrow))

    def _convert(self, kinds: list[str], target: str, sources: list[str]) -> None:
        if kinds == ["rn", "bf16x2", "f32"]:
            high, low = (_bf16_bits(self.read(each, np.float32)) for each in sources)
            self._write(target, high << 16 | low)
        elif kinds == ["rn", "satfinite", "e4m3x2", "f32"]:
            high, low = (_e4m3_bits(self.read(each, np.float32)) for each in sources)
            self._write(target, high << np.uint16(8) | low)
        elif kinds == ["rn", "f16x2", "e4m3x2"]:
            pair = self.read(sources[0], np.uint16)
            halves = [e4m3((pair >> np.uint16(shift)).astype(np.uint8)) for shift in (0, 8)]
            low, high = (each.astype(np.float16).view(np.uint16).astype(np.uint32) for each in halves)
            self._write(target, high << 16 | low)
        else:
            assert kinds == ["f32", "f16"]
            self._write(target, self.read(sources[0], np.uint16).view(np.float16).astype(np.float32))

    def _addresses(self, text: str) -> np.ndarray:
        base, _, offset = text[1:].partition("+")
        return self.read(base, np.uint64).astype(np.int64) + int(offset or 0)

    def _move(self, name: str, arguments: list[str], real: np.ndarray) -> None:
        space = self.cluster.shared[self.rank] if ".shared" in name else self.memory
        load = name.startswith("ld")
        registers, place = arguments if load else arguments[::-1]
        names = _names(registers) if registers.startswith("{") else [registers]
        width = int(re.findall(r"\d+$", name)[0]) // 8
        at = self._addresses(place)
        assert (at[real] % (width * len(names)) == 0).all()
        for n, register in enumerate(names):
            where = (at + n * width)[real, None] + np.arange(width)
            if not load:
                kind = np.uint16 if width == 2 else np.uint32
                space[where] = self.read(register, kind)[real, None].copy().view(np.uint8)
                continue
            value = np.zeros((self.count, 4), np.uint8)
            if not real.all() and register in self.registers:
                value[:] = self.read(register)[:, None].copy().view(np.uint8)
            value[real, :width], value[real, width:] = space[where], 0
            self._write(register, value.view(np.uint32)[:, 0])

    def _store_matrices(self, name: str, arguments: list[str]) -> None:
        assert ".trans." in name
        at, shared = self._addresses(arguments[0]), self.cluster.shared[self.rank]
        for warp in range(self.count // 32):
            for n, register in enumerate(_names(arguments[1])):
                # Thread i has row i // 4, columns i % 4 * 2 and the next; thread 8n + i where row i goes.
                matrix = self.read(register)[32 * warp :][:32].copy().view(np.uint16).reshape(8, 8)
                for row in range(8):
                    place = at[32 * warp + 8 * n + row]
                    assert place % 16 == 0
                    shared[place : place + 16] = matrix.T[row].copy().view(np.uint8)

    def _tell(self, name: str, arguments: list[str], real: np.ndarray) -> None:
        """Barriers, and copies that they hear of; of shared memory, an address says whose it is."""
        barriers, rank = self.cluster.barriers, self.rank

        def whose(address: int) -> tuple[int, int]:
            program, place = divmod(int(address), 1 << REMOTE)
            return (program - 1 if program else rank), place

        if name.startswith("mbarrier.init"):
            count = int(arguments[1])
            for address in self._addresses(arguments[0])[real]:
                barriers[whose(address)] = Barrier(count, count)
        elif name.startswith("mbarrier.arrive.expect_tx"):
            bytes = self.read(arguments[2])
            for address, expected in zip(self._addresses(arguments[1])[real], bytes[real], strict=True):
                barriers[whose(address)].told(1, int(expected))
        elif name.startswith("mbarrier.try_wait"):
            parity = self.read(arguments[2])
            places = self._addresses(arguments[1])
            waited = zip(places, parity, strict=True)
            over = [barriers[whose(place)].phase != phase for place, phase in waited]
            self._write(arguments[0], np.array(over))
        elif name.startswith("st.async"):
            to, registers, barrier = arguments
            names = registers[1:].replace(" ", "").split(",") if registers.startswith("{") else [registers]
            values = np.stack([self.read(each) for each in names], 1)
            places, told = self._addresses(to), self._addresses(barrier)
            for thread in np.flatnonzero(real):
                program, place = whose(places[thread])
                self.cluster.shared[program][place : place + 4 * len(names)] = values[thread].view(np.uint8)
                barriers[whose(told[thread])].told(0, -4 * len(names))
        else:
            to, source, size, barrier = arguments
            places, sources, told = (self._addresses(each) for each in (to, source, barrier))
            sizes = self.read(size)
            for thread in np.flatnonzero(real):
                program, place = whose(places[thread])
                start, bytes = sources[thread], int(sizes[thread])
                assert place % 16 == start % 16 == bytes % 16 == 0
                self.cluster.shared[program][place : place + bytes] = self.memory[start : start + bytes]
                barriers[whose(told[thread])].told(0, -bytes)

    def _tensor(self, name: str, arguments: list[str]) -> None:
        if name.startswith("wgmma.commit_group"):
            self.pending.append(self.issued)
            self.issued = {}
        elif name.startswith("wgmma.wait_group"):
            while len(self.pending) > int(arguments[0]):
                self.registers |= self.pending.pop(0)
        elif name.startswith("wgmma.mma_async"):
            self._product(int(re.findall(r"n(\d+)k32\.f32\.e4m3\.e4m3", name)[0]), arguments)

    def _product(self, width: int, arguments: list[str]) -> None:
        sums, operand = (each[1:].replace(" ", "").split(",") for each in arguments[:2])
        assert len(sums) == width // 2
        (descriptor,) = set(self.read(arguments[2], np.uint64).tolist())
        assert descriptor >> 62 == 1  # 128-byte swizzle
        assert descriptor >> 32 & 0x3FFF == 1024 // 16
        linear = (descriptor & 0x3FFF) * 16 + np.arange(width)[:, None] * 128 + np.arange(32)
        columns = e4m3(self.cluster.shared[self.rank][linear ^ (linear >> 7 & 7) << 4])
        rows = np.zeros((64, 32), np.float32)
        for n, register in enumerate(operand):
            values = e4m3(self.read(register).copy().view(np.uint8).reshape(self.count, 4))
            row = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n % 2)
            column = self.lane % 4 * 4 + 16 * (n // 2)
            rows[row[:, None], column[:, None] + np.arange(4)] = values
        result = rows @ columns.T
        for n, register in enumerate(sums):
            row = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n // 2 % 2)
            value = result[row, n // 4 * 8 + self.lane % 4 * 2 + n % 2]
            old = self.issued.get(register)
            if self.registers[arguments[3]].all():
                value = (self.read(register, np.float32) if old is None else old) + value
            self.issued[register] = value

    def _product_of_warps(self, arguments: list[str]) -> None:
        """m16n8k16 in bfloat16."""
        found, a, b, old = (each[1:].replace(" ", "").split(",") for each in arguments)
        warp, t, c = self.lane // 32, self.lane % 32 // 4, self.lane % 4
        rows, columns = np.zeros((self.count // 32, 16, 16)), np.zeros((self.count // 32, 8, 16))
        for n, register in enumerate(a):
            for half, value in enumerate(_bf16_pair(self.read(register))):
                rows[warp, t + 8 * (n % 2), 2 * c + half + 8 * (n // 2)] = value
        for n, register in enumerate(b):
            for half, value in enumerate(_bf16_pair(self.read(register))):
                columns[warp, t, 2 * c + half + 8 * n] = value
        result = np.einsum("wik,wjk->wij", rows, columns)
        for n, (register, before) in enumerate(zip(found, old, strict=True)):
            value = result[warp, t + 8 * (n // 2), 2 * c + n % 2] + self.read(before, np.float32)
            self._write(register, value.astype(np.float32))


def _names(vector: str) -> list[str]:
    return vector[1:].replace(" ", "").split(",")


def swizzled(rows: np.ndarray) -> np.ndarray:
    """[rows, 128] bytes as the copy engine puts them into shared memory."""
    at = np.arange(rows.size)
    stored = np.empty(rows.size, np.uint8)
    stored[at ^ (at >> 7 & 7) << 4] = rows.reshape(-1)
    return stored


def e4m3(values: np.ndarray) -> np.ndarray:
    return values.view(jnp.float8_e4m3fn).astype(np.float32)


def _e4m3_bits(values: np.ndarray) -> np.ndarray:
    """As a conversion that stays within the finite numbers gives them, 16 bits each."""
    return np.clip(values, -448, 448).astype(jnp.float8_e4m3fn).view(np.uint8).astype(np.uint16)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)


def _bf16_pair(words: np.ndarray) -> list[np.ndarray]:
    """The two numbers of a word."""
    return [each.view(np.float32) for each in (words << np.uint32(16), words & np.uint32(0xFFFF0000))]


def _prmt(low: np.ndarray, high: np.ndarray, which: np.ndarray) -> np.ndarray:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    found = np.zeros(len(low), np.uint64)
    for n in range(4):
        digit = which.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), 255, 0).astype(np.uint64)
        found |= np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return found.astype(np.uint32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xF8).all()
    return a | (b & c)


def _halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a.copy().view(np.uint16), b.copy().view(np.uint16)).view(np.uint32)


KINDS = {"f32": np.float32, "s32": np.int32, "u64": np.uint64, "s64": np.uint64}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater, "ge": np.greater_equal}
OPERATIONS = {
    "max.u16x2": _halves,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "div": np.floor_divide,
    "rem": np.remainder,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "bfe": lambda a, first, width: a >> first & ((1 << width) - 1).astype(np.uint32),
    "prmt": _prmt,
    "lop3": _lop3,
    "mov": lambda a: a,
    "ex2": np.exp2,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}
