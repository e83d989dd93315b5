#!/usr/bin/env python3
"""Seconds until a model is ready: without a cache of compiled programs, and with the one that this left.

Two things are started, each twice in a process of its own: an engine's program of decode steps of all layers
of the released model, without its weights; and `dsv4-jax warmup` on a checkpoint, by default a made-up one of
four layers of Flash's width, which compiles all that serving needs.

  python scripts/bench/startup.py --results scripts/bench/results/h200.json
  python scripts/bench/startup.py --only step --case "decode B=32 ctx=32k"
"""

import argparse
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
    """A process that compiles a step: `us` is of that, or of finding what was compiled."""
    options = ["--compile-here", "--model", model, "--case", case]
    return json.loads(_output([sys.executable, __file__, *options], programs).splitlines()[-1])


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
        environment["TRITON_CACHE_DIR"] = str(programs / "triton")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stderr + done.stdout


def compile_step(name: str, case: str) -> dict[str, Any]:
    """An engine's decode steps of all layers, from shapes alone: traced and compiled, or found."""
    begin = time.perf_counter()
    import jax
    from decode import Case, Model, works
    from made_up import parameter_shapes, shapes_on_device

    from dsv4_jax.compiles import count_compiles
    from dsv4_jax.config import PRESETS
    from dsv4_jax.engine import STEPS_ON_GPU
    from dsv4_jax.numerics import OFFICIAL
    from dsv4_jax.programs import compiled
    from dsv4_jax.slots import take_steps

    parsed, config = Case.parse(case), PRESETS[name]
    model = Model(name, config, config, *parameter_shapes(config, mtp=parsed.drafts > 0))
    work = works(model, parsed, 0, STEPS_ON_GPU)[0]
    state = shapes_on_device(jax.eval_shape(work.state))
    arguments = *(work.params, state["requests"], state["sequences"]), *(state["forced"], state["most"])
    made = time.perf_counter()
    with count_compiles() as compiles:
        compiled(take_steps, (config, OFFICIAL, False), arguments, None)
    return {
        "id": f"{name} {config.num_hidden_layers} layers {parsed.of_model}",
        "us": round((time.perf_counter() - made) * 1e6),
        "compile_s": round(compiles.seconds, 2),
        "before_s": round(made - begin, 2),  # importing, and the shapes
    }


if __name__ == "__main__":
    sys.exit(main())
