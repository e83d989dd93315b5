#!/usr/bin/env python3
"""Kills a batch with SIGKILL again and again; the file must be that of an undisturbed run in the end.

python scripts/kill_and_resume.py CHECKPOINT --prompts 2000 --kills 20
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsv4_jax.config import Config


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        _write_prompts(
            prompts, arguments.prompts, Config.from_pretrained(arguments.checkpoint).vocab_size, draw
        )
        command = [
            sys.executable,
            "-m",
            "dsv4_jax",
            "generate",
            str(arguments.checkpoint),
            "-i",
            str(prompts),
        ]
        command += ["--compile-cache", str(folder / "programs"), "--max-batch", "16"]
        started = time.monotonic()
        subprocess.run([*command, "-o", str(folder / "whole.jsonl")], check=True, capture_output=True)
        print(f"undisturbed: {time.monotonic() - started:.0f} s")

        pieces, kills, torn, started = folder / "pieces.jsonl", 0, 0, time.monotonic()
        # A life ends when the file has so many rows, and a moment of its own after that.
        ends = sorted(draw.sample(range(1, arguments.prompts), arguments.kills))
        for end in ends:
            process = subprocess.Popen(
                [*command, "-o", str(pieces)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while process.poll() is None and _rows(pieces) < end:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            torn += not pieces.read_bytes().endswith(b"\n")
        subprocess.run([*command, "-o", str(pieces)], check=True, capture_output=True)
        same = (folder / "whole.jsonl").read_bytes() == pieces.read_bytes()
        print(
            f"killed {kills} times, at {', '.join(map(str, ends))} rows or after; {torn} lines were torn;"
            f" {time.monotonic() - started:.0f} s; {_rows(pieces)} rows,"
            f" {'the same bytes' if same else 'OTHER BYTES'}"
        )
    return 0 if same and kills == arguments.kills else 1


def _write_prompts(path: Path, count: int, vocab_size: int, draw: random.Random) -> None:
    with path.open("w") as file:
        for number in range(count):
            tokens = [draw.randrange(2, vocab_size) for _ in range(draw.randint(1, 60))]
            row = {"id": number, "tokens": tokens, "max_tokens": draw.randint(1, 12), "seed": number}
            row["temperature"] = draw.choice([0, 0.8])
            file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
