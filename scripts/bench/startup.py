#!/usr/bin/env python3
"""Seconds until a model is ready: without a cache of compiled programs, and with the one that this left.

Two things are started, each twice in a process of its own: the program of a decode step of all layers of the
released model, which is traced and compiled without its weights; and `dsv4-jax warmup` on a checkpoint, by
default a made-up one of four layers of Flash's width, which compiles all that serving needs.

  python scripts/bench/startup.py --results scripts/bench/results/h200.json
  python scripts/bench/startup.py --only step --case "decode B=32 ctx=32k"
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, save

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="flash", help="as of decode.py")
    parser.add_argument("--case", default="decode B=1 ctx=32k", help="as of decode.py")
    parser.add_argument("--only", choices=["step", "warmup"])
    parser.add_argument("--checkpoint", type=Path, help="for warmup; by default one is written for it")
    parser.add_argument("--max-len", type=int, default=4096, help="for warmup")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    parser.add_argument("--compile-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile_here:
        print(json.dumps(compile_step(options.model, options.case)))
        return 0

    rows = []
    with tempfile.TemporaryDirectory(prefix="dsv4-startup-") as temporary:
        folder = Path(temporary)
        if options.only != "warmup":
            for state in ("cold", "warm"):  # the second finds what the first left
                row = step(options.model, options.case, folder / "step")
                rows.append(row | {"id": f"start {row['id']}, {state}"})
                print(rows[-1], flush=True)
        if options.only != "step":
            checkpoint = options.checkpoint or made_up_checkpoint(folder / "checkpoint")
            for state in ("cold", "warm"):
                row = warmup(checkpoint, options.max_len, folder / "warmup")
                rows.append(row | {"id": f"start {row['id']}, {state}"})
                print(rows[-1], flush=True)
    if options.results:
        here = facts() | {"implementation": "default"}  # asked last: it takes the device
        save([row | here for row in rows], options.results)
    return 0


def step(model: str, case: str, programs: Path) -> dict[str, Any]:
    """A process that compiles a step: `us` is tracing and compiling, or finding what was compiled."""
    options = ["--compile-here", "--model", model, "--case", case]
    found = json.loads(_output([sys.executable, __file__, *options], programs).splitlines()[-1])
    return found | {"us": round((found["trace_s"] + found["compile_s"]) * 1e6)}


def warmup(checkpoint: Path, max_len: int, programs: Path) -> dict[str, Any]:
    """`dsv4-jax warmup`: `us` is of the whole process, `ready_s` what it says of its programs."""
    sizes = ["--max-len", str(max_len), "--max-batch", "16"]
    command = [sys.executable, "-m", "dsv4_jax", "warmup", str(checkpoint), *sizes]
    begin = time.perf_counter()
    said = _output([*command, "--compile-cache", str(programs)])
    seconds = time.perf_counter() - begin
    found = re.search(r"(\d+) programs ready in ([\d.]+) s", said)
    assert found is not None, said
    numbers = {"us": round(seconds * 1e6), "programs": int(found[1]), "ready_s": float(found[2])}
    return {"id": f"warmup {' '.join(sizes)}"} | numbers


def made_up_checkpoint(folder: Path) -> Path:
    _output([sys.executable, str(HERE / "load.py"), "--step", "write", "--checkpoint", str(folder)])
    return folder


def _output(command: list[str], programs: Path | None = None) -> str:
    """stderr and stdout of a command, which keeps its compiled programs in this folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    if programs is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(programs)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stderr + done.stdout


def compile_step(name: str, case: str) -> dict[str, Any]:
    """Traces and compiles a case's whole model, of all layers; their shapes are those of a few."""
    begin = time.perf_counter()
    import jax
    from decode import Case, Model, prepare, works

    parsed = Case.parse(case)
    few = Model.made_up(name, 2, mtp=parsed.drafts > 0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), few.params)
    hashed, of_kind = few.config.num_hash_layers, {}
    for place, ratio in enumerate(few.config.main_ratios):
        of_kind[ratio, place < hashed] = shapes["layers"][place]
    layers = {
        place: of_kind[ratio, place < few.whole.num_hash_layers]
        for place, ratio in enumerate(few.whole.main_ratios)
    }
    whole = dataclasses.replace(few, config=few.whole, params=shapes | {"layers": layers})
    work = works(whole, parsed, piece=512, count=8)[0]
    made = time.perf_counter()
    prepared = prepare(work, None)
    return {
        "id": f"{name} {few.whole.num_hidden_layers} layers {parsed.of_model}",
        "trace_s": round(prepared.trace_s, 2),
        "compile_s": round(prepared.compile_s, 2),
        "before_s": round(made - begin, 2),  # importing, and the numbers of a few layers
    }


if __name__ == "__main__":
    sys.exit(main())
