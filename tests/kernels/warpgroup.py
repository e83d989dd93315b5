"""A small emulator of a warpgroup, written after the PTX manual, for PTX that a test wants to see computed.

It knows straight text: fragments of `wgmma` in E4M3, the 128-byte swizzle of its second operand, and that
nobody may touch a product before it was waited for.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

THREADS = 128


class Warpgroup:
    """128 threads in step. A register is an array of 128 numbers, of a dtype by its use."""

    def __init__(self, shared: np.ndarray, memory: np.ndarray):
        self.shared, self.memory = shared, memory
        self.registers: dict[str, np.ndarray] = {}
        self.pending: list[dict[str, np.ndarray]] = []  # groups of products under way
        self.issued: dict[str, np.ndarray] = {}
        self.lane = np.arange(THREADS)

    def run(self, text: str, operands: dict[str, np.ndarray]) -> None:
        self.registers |= {f"${name}": value for name, value in operands.items()}
        for line in text.split(";"):
            if line.strip():
                self._step(line.strip())
        assert not self.pending
        assert not self.issued

    def read(self, name: str, kind: Any = np.uint32) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            return np.full(THREADS, int(name, 0) % (1 << 8 * np.dtype(kind).itemsize), kind)
        if name.startswith("0f"):
            return np.full(THREADS, int(name[2:], 16), np.uint32).view(np.float32)
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        value = self.registers[name]
        return value.view(kind) if value.dtype.itemsize == np.dtype(kind).itemsize else value.astype(kind)

    def _write(self, name: str, value: np.ndarray) -> None:
        assert not any(name in group for group in (*self.pending, self.issued)), f"{name} is under way"
        self.registers[name] = value

    def _step(self, line: str) -> None:
        real = np.ones(THREADS, bool)
        if match := re.match(r"@(\w+) (.*)", line):
            real, line = self.registers[match[1]], match[2]
        name, _, rest = line.partition(" ")
        vectors = re.findall(r"\{([^}]*)\}|\[([^]]*)\]|([^,\s{}\[\]]+)", rest)
        arguments = ["{" + a if a else "[" + b if b else c for a, b, c in vectors]
        if name == ".reg":
            return
        if name.startswith("wgmma"):
            self._tensor(name, arguments)
        elif name.startswith(("ld.", "st.")):
            self._move(name, arguments, real)
        else:
            assert real.all()
            self._compute(name, arguments)

    def _compute(self, name: str, arguments: list[str]) -> None:
        target, *sources = arguments
        operation, *kinds = name.split(".")
        kind = {"f32": np.float32, "s32": np.int32, "u64": np.uint64, "s64": np.uint64}.get(
            kinds[-1], np.uint32
        )
        if name == "mov.b64":
            low, high = (self.read(each, np.uint64) for each in sources[0][1:].replace(" ", "").split(","))
            return self._write(target, low | high << np.uint64(32))
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
            assert kinds[:2] == ["sync", "bfly"]
            return self._write(target, self.read(sources[0])[self.lane ^ int(sources[1])])
        if name == "mul.wide.u32":
            first, second = (self.read(each).astype(np.uint64) for each in sources)
            return self._write(target, first * second)
        values = [self.read(each, kind) for each in sources]
        with np.errstate(over="ignore", invalid="ignore"):
            self._write(target, OPERATIONS[name if name in OPERATIONS else operation](*values))

    def _addresses(self, text: str) -> np.ndarray:
        base, _, offset = text[1:].partition("+")
        return self.read(base, np.uint64).astype(np.int64) + int(offset or 0)

    def _move(self, name: str, arguments: list[str], real: np.ndarray) -> None:
        space = self.shared if ".shared" in name else self.memory
        load = name.startswith("ld")
        registers, place = arguments if load else arguments[::-1]
        names = registers[1:].replace(" ", "").split(",") if registers.startswith("{") else [registers]
        at = self._addresses(place)
        assert (at[real] % (4 * len(names)) == 0).all()
        for n, register in enumerate(names):
            where = (at + n * 4)[real, None] + np.arange(4)
            if load:
                value = np.zeros((THREADS, 4), np.uint8)
                value[real] = space[where]
                self._write(register, value.view(np.uint32)[:, 0])
            else:
                space[where] = self.read(register)[real, None].copy().view(np.uint8)

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
        columns = e4m3(self.shared[linear ^ (linear >> 7 & 7) << 4])
        rows = np.zeros((64, 32), np.float32)
        for n, register in enumerate(operand):
            values = e4m3(self.read(register).copy().view(np.uint8).reshape(THREADS, 4))
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


def swizzled(rows: np.ndarray) -> np.ndarray:
    """[rows, 128] bytes as the copy engine puts them into shared memory."""
    at = np.arange(rows.size)
    stored = np.empty(rows.size, np.uint8)
    stored[at ^ (at >> 7 & 7) << 4] = rows.reshape(-1)
    return stored


def e4m3(values: np.ndarray) -> np.ndarray:
    return values.view(jnp.float8_e4m3fn).astype(np.float32)


def _prmt(low: np.ndarray, high: np.ndarray, which: np.ndarray) -> np.ndarray:
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


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xF8).all()
    return a | (b & c)


def _halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater, "ge": np.greater_equal}
OPERATIONS = {
    "max.u16x2": lambda a, b: _halves(a.copy(), b.copy()),
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "abs": np.abs,
    "max": np.maximum,
    "and": np.bitwise_and,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "bfe": lambda a, first, width: a >> first & ((1 << width) - 1).astype(np.uint32),
    "prmt": _prmt,
    "lop3": _lop3,
    "mov": lambda a: a,
}
