#!/usr/bin/env python3
"""Opens mutated shards, indexes and configs: only errors of our own may come, soon, and in little memory.

What safetensors takes we take, and what it refuses we refuse, tensors of types that numpy lacks aside. A
worker that crashes, a case that takes more than 5 s and more than 1 GiB of memory are failures; each is
printed with the number that makes it again.

python scripts/fuzz_checkpoints.py --count 100000
python scripts/fuzz_checkpoints.py --only 4711
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsv4_jax.config import FLASH, Config
from dsv4_jax.errors import DSV4Error
from dsv4_jax.weight_files import DTYPES, INDEX_NAME, WeightFiles

SLOWEST, MOST_MEMORY = 5.0, 2**30  # seconds; bytes
_PART = 2000  # cases of one worker

_BODY = bytes(range(48))
_HEADER = {
    "a": {"dtype": "BF16", "shape": [2, 6], "data_offsets": [0, 24]},
    "b": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [24, 40]},
    "c": {"dtype": "F8_E8M0", "shape": [2, 4], "data_offsets": [40, 48]},
    "__metadata__": {"format": "pt"},
}
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = {"metadata": {"total_size": 48}, "weight_map": {"a": _SHARDS[0], "b": _SHARDS[0], "c": _SHARDS[1]}}
_ALIEN = [
    b"9" * 400,
    b"-1",
    b"1e400",
    b"null",
    b'"',
    b"{",
    b"[" * 2000,
    b"\\ud800",
    b"\xff",
    b"\x00",
    b"../",
    b"/etc",
]


def _shard(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes, numbers, pieces moved, cut or repeated, the header's length."""
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        place = draw.randrange(len(data) + 1)
        end = min(place + draw.choice([1, 1, 2, 8, 40]), len(data))
        match draw.randrange(8):
            case 0:
                data = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
            case 1:
                data = data[:place] + draw.choice(_ALIEN) + data[end:]
            case 2:
                data = data[:place] + data[end:]
            case 3:
                data = data[:place] + data[place:end] * draw.choice([2, 2, 50]) + data[end:]
            case 4:
                data = data[:place]
            case 5:
                digit = [n for n, byte in enumerate(data) if 48 <= byte < 58]
                if digit:
                    n = draw.choice(digit)
                    data = (
                        data[:n] + str(draw.choice([0, 1, 7, 2**31, 2**63, 2**64])).encode() + data[n + 1 :]
                    )
            case 6:
                length = draw.choice([0, 1, 7, len(data), 100_000_000, 100_000_001, 2**63, 2**64 - 1])
                data = struct.pack("<Q", length) + data[8:]
            case 7:
                data = data + bytes(draw.randrange(1, 40))
        data = data[: 2**20] or b"\0"
    return data


def _edited(draw: random.Random) -> bytes:
    """A shard whose header is JSON of the right length, one or two entries of it changed."""
    header = json.loads(json.dumps(_HEADER))
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        match draw.randrange(8):
            case 0:
                entry["dtype"] = draw.choice([*DTYPES, "F4", "F6_E2M3", "f32", None])
            case 1:
                entry["shape"] = draw.choice(
                    [[12], [2, 3, 2], [1, 12, 1], [4, 2], [], [0, 7], [2**32, 2**32], [-1]]
                )
            case 2:
                entry["data_offsets"][draw.randrange(2)] += draw.choice([-8, -1, 1, 8, 2**40])
            case 3:
                entry["more"] = draw.choice([None, [1], {"a": 2}])
            case 4:
                header[draw.choice(["", "../../etc/x", "d" * 300, "a", "日"])] = header.pop(name)
            case 5:
                header["empty"] = {"dtype": "F32", "shape": [0, draw.randrange(9)], "data_offsets": [48, 48]}
            case 6:
                del entry[draw.choice(list(entry))]
            case 7:
                header["__metadata__"] = draw.choice([{}, {"a": "b"}, {"a": 1}, None, []])
        if not all("data_offsets" in each for key, each in header.items() if key != "__metadata__"):
            break
    return _shard(header, draw.choice([_BODY, _BODY, _BODY, _BODY[:-1], _BODY + b"x"]))


def _library_takes(shard: Path) -> bool:
    try:
        with safe_open(shard, framework="numpy") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return False
    return bool(dtypes) and dtypes <= DTYPES.keys()


def _shard_case(folder: Path, draw: random.Random) -> str:
    shard = folder / "model.safetensors"
    content = _edited(draw) if draw.random() < 0.5 else _mutated(_shard(_HEADER, _BODY), draw)
    shard.write_bytes(content)
    try:
        with WeightFiles.open(folder) as files:
            read = {name: files.read(name).tobytes() for name in files.tensors}
            where = {name: (info.offset, info.nbytes) for name, info in files.tensors.items()}
    except DSV4Error as error:
        taken = "numpy cannot hold" in str(error)
        if _library_takes(shard) and not taken:
            raise AssertionError(f"safetensors takes it, we say: {error}") from error
        return "refused"
    if not _library_takes(shard):
        raise AssertionError("safetensors refuses what we take")
    for name, (offset, nbytes) in where.items():
        if read[name] != content[offset : offset + nbytes]:
            raise AssertionError(f"{name} was read as other bytes")
    return "taken"


def _index_case(folder: Path, draw: random.Random) -> str:
    first = {name: entry for name, entry in _HEADER.items() if name != "c"}
    second = {"c": _HEADER["c"] | {"data_offsets": [0, 8]}}
    (folder / _SHARDS[0]).write_bytes(_shard(first, _BODY[:40]))
    (folder / _SHARDS[1]).write_bytes(_shard(second, _BODY[40:]))
    (folder / INDEX_NAME).write_bytes(_mutated(json.dumps(_INDEX, indent=2).encode(), draw))
    try:
        with WeightFiles.open(folder) as files:
            outside = [path for path in files.shards if path.resolve().parent != folder.resolve()]
            if outside:
                raise AssertionError(f"reads outside of the folder: {outside}")
            if files.tensors.keys() != {"a", "b", "c"}:
                raise AssertionError(f"took the tensors {sorted(files.tensors)}")
            for name in files.tensors:
                files.read(name)
    except DSV4Error:
        return "refused"
    return "taken"


def _config_case(folder: Path, draw: random.Random) -> str:
    (folder / "config.json").write_bytes(_mutated(json.dumps(FLASH.to_dict(), indent=1).encode(), draw))
    try:
        Config.from_pretrained(folder)
    except DSV4Error:
        return "refused"
    return "taken"


KINDS = {"shard": _shard_case, "index": _index_case, "config": _config_case}
_WEIGHTS = {"shard": 6, "index": 3, "config": 1}


def run_case(number: int, folder: Path) -> tuple[str, str]:
    """The kind of a case, and what came of it: "taken", "refused", or what is wrong."""
    draw = random.Random(number)
    (kind,) = draw.choices(list(KINDS), list(_WEIGHTS.values()))
    for path in folder.iterdir():
        path.unlink()
    try:
        return kind, KINDS[kind](folder, draw)
    except Exception:
        return kind, traceback.format_exc().strip()


def _run_part(first: int, count: int, results: multiprocessing.SimpleQueue) -> None:
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(first, first + count):
        started = time.monotonic()
        kind, found = run_case(number, folder)
        seconds = time.monotonic() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - begun
        results.put((number, kind, found, seconds, grown))
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one case, and what came of it")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as name:
            print(*run_case(arguments.only, Path(name)))
        return 0
    counts: dict[tuple[str, str], int] = {}
    failures, slowest, most, started = 0, 0.0, 0, time.monotonic()
    end = arguments.first + arguments.count
    for first in range(arguments.first, end, _PART):
        results = multiprocessing.SimpleQueue()
        count = min(_PART, end - first)
        worker = multiprocessing.Process(target=_run_part, args=(first, count, results))
        worker.start()
        done = 0
        while done < count and (worker.is_alive() or not results.empty()):
            if results.empty():
                time.sleep(0.01)
                continue
            number, kind, found, seconds, grown = results.get()
            done += 1
            slowest, most = max(slowest, seconds), max(most, grown)
            label = found if len(found) < 10 else "WRONG"
            counts[kind, label] = counts.get((kind, label), 0) + 1
            if len(found) >= 10 or seconds > SLOWEST or grown > MOST_MEMORY:
                failures += 1
                print(
                    f"case {number} ({kind}): {found}; {seconds:.1f} s, {grown / 2**20:.0f} MiB", flush=True
                )
        worker.join()
        if done < count:
            failures += 1
            print(f"case {first + done}: the worker ended with exit code {worker.exitcode}", flush=True)
    told = ", ".join(f"{kind} {found} {count:,}" for (kind, found), count in sorted(counts.items()))
    print(
        f"{arguments.count:,} cases in {time.monotonic() - started:.0f} s, {failures} failures: {told};"
        f" slowest {slowest:.2f} s, most memory {most / 2**20:.0f} MiB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
