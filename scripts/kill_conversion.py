#!/usr/bin/env python3
"""Kills conversions at random points, goes on with each, and flips bits.

  python scripts/kill_conversion.py --kills 20 --flips 100

A made-up checkpoint of about 100 MB is converted undisturbed, then again and again: each time killed with
SIGKILL at a random moment, and gone on with. The exit code is 1 if a manifest differs or a flip is not found.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsv4_jax.checkpoint.converted import MANIFEST, STATE, verify_files
from dsv4_jax.errors import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="dsv4-convert-") as temporary:
        source, whole, out = (Path(temporary) / name for name in ("source", "whole", "out"))
        made = [sys.executable, "scripts/make_checkpoint.py", str(source), "--demo"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        started, seconds = _convert(source, whole)
        print(f"undisturbed: {seconds:.1f} s, of which {seconds - started:.1f} s are writing", flush=True)
        expected = (whole / MANIFEST).read_text()
        same = 0
        for number in range(arguments.kills):
            done = None
            while done is None:  # it may be done before it is killed
                shutil.rmtree(out, ignore_errors=True)
                done = _kill(source, out, choose.uniform(0, seconds - started))
            _convert(source, out)
            alike = (out / MANIFEST).read_text() == expected and verify_files(out) > 0
            same += alike
            verdict = "the same" if alike else "DIFFERENT"
            print(f"{number + 1}: killed with {done} pieces done, {verdict}", flush=True)
        found = sum(_flip(choose, whole) for _ in range(arguments.flips))
    print(f"{same} of {arguments.kills} manifests the same")
    print(f"{found} of {arguments.flips} flipped bits found")
    return 0 if same == arguments.kills and found == arguments.flips else 1


def _command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "dsv4_jax", "convert", str(source), str(out)]


def _convert(source: Path, out: Path) -> tuple[float, float]:
    """Seconds till it began to write, and till it was done."""
    begin, started = time.perf_counter(), None
    with subprocess.Popen(_command(source, out), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if started is None and (out / STATE).exists():
                started = time.perf_counter() - begin
            time.sleep(0.005)
    assert process.returncode == 0
    return started or 0.0, time.perf_counter() - begin


def _kill(source: Path, out: Path, seconds: float) -> int | None:
    """Kills a conversion so many seconds after it began to write; how many pieces it had done by then."""
    with subprocess.Popen(_command(source, out), stderr=subprocess.DEVNULL) as process:
        while not (out / STATE).exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
    if not (out / STATE).exists():
        return None
    return max((out / STATE).read_text().count("\n") - 1, 0)


def _flip(choose: random.Random, folder: Path) -> bool:
    """Flips a bit anywhere in a checkpoint, and back; whether it was found meanwhile."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = [path.stat().st_size for path in files]
    path = choose.choices(files, weights if choose.random() < 0.5 else None)[0]
    bit = choose.randrange(8 * path.stat().st_size)
    found = False
    for times in range(2):
        with path.open("r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
        if not times:
            try:
                verify_files(folder)
                found = False
            except CheckpointError:
                found = True
    return found


if __name__ == "__main__":
    sys.exit(main())
