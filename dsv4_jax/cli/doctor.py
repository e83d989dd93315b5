"""`dsv4-jax doctor`: what this machine can run, and whether it computes right."""

import argparse
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dsv4_jax.cli.options import add_command, add_json
from dsv4_jax.cli.talk import show
from dsv4_jax.errors import DistributedError, NumericError, RequestError
from dsv4_jax.evaluation.environment import versions
from dsv4_jax.selftest import check_kernels
from pallas_kernels import current_target

_OPTIONAL = {"lm_eval": "eval", "matplotlib": "report", "deepseek_recipe": "chat with tools"}
_BADNESS = ("ok", "failed", "wrong")
_PATIENCE = 60  # seconds that processes have to find each other


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "doctor",
        "what this machine can run, and a test of every kernel against its definition",
        """
        dsv4-jax doctor
        dsv4-jax doctor --multiprocess 2
        dsv4-jax doctor --json
        """,
    )
    command.add_argument(
        "--no-kernels", action="store_true", help="only say which kernels fit here, and run none"
    )
    command.add_argument(
        "--multiprocess",
        type=int,
        default=0,
        metavar="N",
        help="also let N processes on CPUs find each other",
    )
    command.add_argument("--process", help=argparse.SUPPRESS)  # "COORDINATOR,N,I": one of these
    add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """70 if a kernel is wrong, 69 if processes do not find each other."""
    if arguments.process:
        return _be_one_of(*arguments.process.split(","))
    if arguments.multiprocess == 1 or arguments.multiprocess < 0:
        raise RequestError(f"--multiprocess must be at least 2, got {arguments.multiprocess}")
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "optional": {name: _is_there(name) for name in _OPTIONAL},
        "target": {"vendor": current_target().vendor, "arch": current_target().arch},
        "devices": [_device(device) for device in jax.devices()],
    }
    if not arguments.json:
        print("\n".join(_lines(report)), flush=True)
    if not arguments.json:
        held = "not run" if arguments.no_kernels else "how far from its definition"
        print(f"ops of a small model: what runs by default; each kernel that fits here, {held}", flush=True)
    report["kernels"] = []
    verdicts = check_kernels(run=not arguments.no_kernels)
    for function, group in itertools.groupby(verdicts, key=lambda verdict: verdict.function):
        mine = [vars(verdict) for verdict in group]
        report["kernels"] += mine
        if not arguments.json:
            print(_line(function, mine), flush=True)
    if arguments.multiprocess:
        report["processes"] = _check_processes(arguments.multiprocess)
        if not arguments.json:
            print(f"processes: {arguments.multiprocess} found each other and agree", flush=True)
    if arguments.json:
        show(report)
    wrong = [each for each in report["kernels"] if each["status"] in ("wrong", "failed")]
    if wrong:
        told = ", ".join(f"{each['function']} by {each['implementation']}" for each in wrong)
        raise NumericError(
            f"{len(wrong)} kernels do not agree with their definitions here: {told}",
            hint="run with --implementation OP=reference for these ops, and report it",
        )
    return 0


def _is_there(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _device(device: Any) -> dict[str, Any]:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {"id": device.id, "platform": device.platform, "kind": device.device_kind, "bytes": limit}


def _lines(report: Mapping[str, Any]) -> list[str]:
    target = report["target"]
    lines = [
        f"python {report['python']} on {report['platform']}",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        ", ".join(
            f"{name} {'yes' if there else f'no ({_OPTIONAL[name]})'}"
            for name, there in report["optional"].items()
        ),
        f"target: {target['vendor']} {target['arch']}".rstrip(),
    ]
    for device in report["devices"]:
        memory = f", {device['bytes'] / 2**30:.1f} GiB" if device["bytes"] else ""
        lines.append(f"device {device['id']}: {device['kind']} ({device['platform']}{memory})")
    return lines


def _line(function: str, verdicts: Sequence[Mapping[str, Any]]) -> str:
    """On a function: what runs by default, and the worst of each kernel that fits here."""
    defaults = ", ".join(dict.fromkeys(each["implementation"] for each in verdicts if each["default"]))
    cells = []
    for name in dict.fromkeys(each["implementation"] for each in verdicts):
        here = [each for each in verdicts if each["implementation"] == name and each["status"] != "not here"]
        if name == "reference" or not here:
            continue
        worst = max(here, key=lambda each: _BADNESS.index(each["status"]))
        errors = [each["error"] for each in here if each["error"] is not None]
        error = f" {max(errors):.0e}" if errors else ""
        cells.append(f"{name} {worst['status']}{error}{worst['detail'] and ': ' + worst['detail']}")
    return f"  {function:22} {defaults:22} {'; '.join(cells)}".rstrip()


# --- processes


def _check_processes(count: int) -> list[dict[str, Any]]:
    """Starts processes on this machine's CPUs, and has them add up a number over all of their devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-m", "dsv4_jax", "doctor", "--process"]
    running = [
        subprocess.Popen(
            [*command, f"127.0.0.1:{port},{count},{number}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    deadline = time.monotonic() + _PATIENCE
    found = []
    for number, process in enumerate(running):
        try:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            _stop(running)
            raise DistributedError(f"process {number} of {count} was not done after {_PATIENCE} s") from None
        if process.returncode:
            _stop(running)
            last = err.strip().splitlines()[-1] if err.strip() else "no word of why"
            raise DistributedError(f"process {number} of {count} ended with {process.returncode}: {last}")
        found.append(json.loads(out.strip().splitlines()[-1]))  # gloo says things on stdout too
    expected = sum(range(2 * count))
    if any(each["sum"] != expected or each["processes"] != count for each in found):
        raise DistributedError(f"processes do not agree: {found}, each should have the sum {expected}")
    return found


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


def _be_one_of(coordinator: str, count: str, number: str) -> int:
    """One of the processes of `_check_processes`: prints what it found."""
    jax.distributed.initialize(coordinator, int(count), int(number), initialization_timeout=_PATIENCE)
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    numbers = np.arange(jax.device_count(), dtype=np.int32)
    array = jax.make_array_from_callback(numbers.shape, spread, lambda index: numbers[index])
    total = jax.jit(
        lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    found = {"process": jax.process_index(), "processes": jax.process_count(), "sum": int(total(array))}
    print(json.dumps(found))
    return 0
