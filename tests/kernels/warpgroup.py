"""A small emulator of a warpgroup, written after the PTX manual, for PTX that a test wants to see computed.

It knows straight text: fragments of `wgmma` in E4M3 and of `stmatrix`, the 128-byte swizzle, and that nobody
may touch a product before it was waited for.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

THREADS = 128


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


def swizzled(rows: np.ndarray) -> np.ndarray:
    """[rows, 128] bytes as the copy engine puts them into shared memory."""
    at = np.arange(rows.size)
    stored = np.empty(rows.size, np.uint8)
    stored[at ^ (at >> 7 & 7) << 4] = rows.reshape(-1)
    return stored


class Warpgroup:
    """128 threads in step. Registers are arrays of 128 numbers: bool, or unsigned and as wide as needed.

    Attributes:
      arrived: threads by what they counted up by `red`: (thread, address, the largest number).
    """

    def __init__(self, shared: np.ndarray, memory: np.ndarray):
        self.shared, self.memory = shared, memory
        self.registers: dict[str, np.ndarray] = {}
        self.pending: list[dict[str, np.ndarray]] = []  # groups of products under way
        self.issued: dict[str, np.ndarray] = {}
        self.lane = np.arange(THREADS)
        self.arrived: list[tuple[int, int, int]] = []

    def run(self, text: str, operands: dict[str, np.ndarray]) -> None:
        self.registers |= {f"${name}": value for name, value in operands.items()}
        for line in re.sub(r"//.*", "", text).split(";"):
            if line.strip():
                self.step(line.strip())
        assert not self.pending
        assert not self.issued

    def step(self, line: str) -> None:
        real = np.ones(THREADS, bool)
        if match := re.match(r"@(\w+) (.*)", line):
            real, line = self.registers[match[1]], match[2]
        name, _, rest = line.partition(" ")
        vectors = re.findall(r"\{([^}]*)\}|\[([^]]*)\]|([^,\s{}\[\]]+)", rest)
        arguments = ["{" + a if a else "[" + b if b else c for a, b, c in vectors]
        if name.startswith((".reg", "fence.", "bar.warp.sync")):
            return
        if name.startswith("wgmma"):
            self.tensor(name, arguments)
        elif name.startswith(("ld.", "st.")):
            self.move(name, arguments, real)
        elif name.startswith("stmatrix"):
            self.stmatrix(name, arguments)
        elif name.startswith("red."):
            assert name == "red.release.gpu.global.inc.u32"
            at = self.addresses(arguments[0])
            self.arrived += [(lane, int(at[lane]), int(arguments[1])) for lane in np.flatnonzero(real)]
        else:
            assert real.all()
            self.compute(name.split("."), arguments)

    def read(self, name: str, kind: Any = np.uint32) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            return np.full(THREADS, int(name, 0) % (1 << 8 * np.dtype(kind).itemsize), kind)
        if name.startswith("0f"):
            return np.full(THREADS, int(name[2:], 16), np.uint32).view(np.float32)
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        value = self.registers[name]
        return value.view(kind) if value.dtype.itemsize == np.dtype(kind).itemsize else value.astype(kind)

    def write(self, name: str, value: np.ndarray) -> None:
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        self.registers[name] = value

    def compute(self, name: list[str], arguments: list[str]) -> None:
        target, *sources = arguments
        operation, kind = name[0], name[-1]
        if operation == "mov" and "{" in target + sources[0]:
            return self.repack(kind, target, sources[0])
        if operation == "cvt":
            return self.convert(name, target, sources)
        if operation == "mul" and name[1] == "wide":
            first, second = (self.read(each).astype(np.uint64) for each in sources)
            return self.write(target, first * second)
        if operation == "shfl":
            assert name[1:3] == ["sync", "bfly"]
            return self.write(target, self.read(sources[0])[self.lane ^ int(sources[1])])
        if operation == "setp":
            found = COMPARISONS[name[1]](
                *(self.read(each, TYPES.get(kind, np.uint32)) for each in sources[:2])
            )
            return self.write(target, found & self.registers[sources[2]] if name[2] == "and" else found)
        if operation == "not":
            return self.write(target, ~self.read(sources[0], bool))
        if operation == "selp":
            first, second = (self.read(each, TYPES.get(kind, np.uint32)) for each in sources[:2])
            return self.write(target, np.where(self.registers[sources[2]], first, second))
        values = [self.read(each, TYPES.get(kind, np.uint32)) for each in sources]
        with np.errstate(over="ignore", invalid="ignore"):
            self.write(target, OPERATIONS["max.u16x2" if kind == "u16x2" else operation](*values))

    def repack(self, kind: str, target: str, source: str) -> None:
        """`mov` of two registers to one twice as wide, or back."""
        narrow, wide = {"b64": (np.uint32, np.uint64), "b32": (np.uint16, np.uint32)}[kind]
        bits = wide(8 * np.dtype(narrow).itemsize)
        if source.startswith("{"):
            low, high = (self.read(each, narrow).astype(wide) for each in names_of(source))
            self.write(target, low | high << bits)
        else:
            value = self.read(source, wide)
            for name, part in zip(names_of(target), (value, value >> bits), strict=True):
                self.write(name, part.astype(narrow))

    def convert(self, name: list[str], target: str, sources: list[str]) -> None:
        if name[1:] == ["rn", "bf16x2", "f32"]:
            high, low = (bf16_bits(self.read(each, np.float32)) for each in sources)
            self.write(target, high << 16 | low)
        elif name[1:] == ["rn", "satfinite", "e4m3x2", "f32"]:
            high, low = (e4m3_bits(self.read(each, np.float32)) for each in sources)
            self.write(target, high << np.uint16(8) | low)
        elif name[1:] == ["rn", "f16x2", "e4m3x2"]:
            bytes_ = self.read(sources[0], np.uint16)
            low, high = (
                e4m3((bytes_ >> shift).astype(np.uint8)).astype(np.float16).view(np.uint16).astype(np.uint32)
                for shift in (np.uint16(0), np.uint16(8))
            )
            self.write(target, high << 16 | low)
        else:
            assert name[1:] == ["f32", "f16"]
            self.write(target, self.read(sources[0], np.uint16).view(np.float16).astype(np.float32))

    def addresses(self, text: str) -> np.ndarray:
        base, _, offset = text[1:].partition("+")
        return self.read(base, np.uint64).astype(np.int64) + int(offset or 0)

    def move(self, name: str, arguments: list[str], real: np.ndarray) -> None:
        space = self.shared if ".shared" in name else self.memory
        load = name.startswith("ld")
        registers, place = arguments if load else arguments[::-1]
        names = names_of(registers) if registers.startswith("{") else [registers]
        width = int(re.findall(r"\d+$", name)[0]) // 8
        at = self.addresses(place)
        assert (at[real] % (width * len(names)) == 0).all()
        for n, register in enumerate(names):
            where = (at + n * width)[real, None] + np.arange(width)
            if not load:
                kind = np.uint16 if width == 2 else np.uint32
                space[where] = self.read(register, kind)[real, None].copy().view(np.uint8)
                continue
            value = np.zeros((THREADS, 4), np.uint8)
            if not real.all() and register in self.registers:
                value[:] = self.read(register)[:, None].copy().view(np.uint8)
            value[real, :width], value[real, width:] = space[where], 0
            self.write(register, value.view(np.uint32)[:, 0])

    def stmatrix(self, name: str, arguments: list[str]) -> None:
        assert ".trans." in name
        at, registers = self.addresses(arguments[0]), names_of(arguments[1])
        for warp in range(4):
            for n, register in enumerate(registers):
                # Thread i has row i // 4, columns i % 4 * 2 and the next; thread 8n + i where row i goes.
                matrix = self.read(register)[32 * warp :][:32].copy().view(np.uint16).reshape(8, 8)
                for row in range(8):
                    place = at[32 * warp + 8 * n + row]
                    assert place % 16 == 0
                    self.shared[place : place + 16] = matrix.T[row].copy().view(np.uint8)

    def tensor(self, name: str, arguments: list[str]) -> None:
        if name.startswith("wgmma.commit_group"):
            self.pending.append(self.issued)
            self.issued = {}
        elif name.startswith("wgmma.wait_group"):
            while len(self.pending) > int(arguments[0]):
                self.registers |= self.pending.pop(0)
        elif name.startswith("wgmma.mma_async"):
            self.product(int(re.findall(r"n(\d+)k32\.f32\.e4m3\.e4m3", name)[0]), arguments)

    def product(self, width: int, arguments: list[str]) -> None:
        sums, operand = names_of(arguments[0]), names_of(arguments[1])
        assert len(sums) == width // 2
        (descriptor,) = set(self.read(arguments[2], np.uint64).tolist())
        assert descriptor >> 62 == 1  # 128-byte swizzle
        assert descriptor >> 32 & 0x3FFF == 1024 // 16
        linear = (descriptor & 0x3FFF) * 16 + np.arange(width)[:, None] * 128 + np.arange(32)
        tokens = e4m3(self.shared[linear ^ (linear >> 7 & 7) << 4])
        weights = np.zeros((64, 32), np.float32)
        for n, register in enumerate(operand):
            values = e4m3(self.read(register).copy().view(np.uint8).reshape(THREADS, 4))
            rows = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n % 2)
            columns = self.lane % 4 * 4 + 16 * (n // 2)
            weights[rows[:, None], columns[:, None] + np.arange(4)] = values
        with np.errstate(invalid="ignore"):
            result = weights @ tokens.T
        for n, register in enumerate(sums):
            rows = self.lane // 32 * 16 + self.lane % 32 // 4 + 8 * (n // 2 % 2)
            old = self.issued.get(register, self.registers.get(register))
            value = result[rows, n // 4 * 8 + self.lane % 4 * 2 + n % 2]
            add = self.read(arguments[3], bool).all()
            self.issued[register] = old.view(np.float32) + value if add and old is not None else value


def names_of(vector: str) -> list[str]:
    return vector[1:].replace(" ", "").split(",")


def e4m3(values: np.ndarray) -> np.ndarray:
    return values.view(jnp.float8_e4m3fn).astype(np.float32)


def e4m3_bits(values: np.ndarray) -> np.ndarray:
    """As a conversion that stays within the finite numbers gives them, 16 bits each."""
    return np.clip(values, -448, 448).astype(jnp.float8_e4m3fn).view(np.uint8).astype(np.uint16)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)


def permuted(low: np.ndarray, high: np.ndarray, which: np.ndarray) -> np.ndarray:
    both, found = (
        low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32),
        np.zeros(THREADS, np.uint64),
    )
    for n in range(4):
        digit = which.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), 255, 0).astype(np.uint64)
        found |= np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return found.astype(np.uint32)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xF8).all()
    return a | (b & c)


def larger_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a >> 16, b >> 16) << 16 | np.maximum(a & 0xFFFF, b & 0xFFFF)


TYPES = {"f32": np.float32, "s32": np.int32, "u64": np.uint64, "s64": np.uint64, "pred": bool}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater, "ge": np.greater_equal}
OPERATIONS = {
    "abs": np.abs,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "div": lambda a, b: a // b,
    "rcp": np.reciprocal,
    "min": np.minimum,
    "max": np.maximum,
    "max.u16x2": larger_halves,
    "and": np.bitwise_and,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "bfe": lambda a, first, width: a >> first & ((1 << width) - 1).astype(np.uint32),
    "prmt": permuted,
    "lop3": lop3,
    "mov": lambda a: a,
    "ex2": np.exp2,
}
