"""Several processes as one program: how they find each other, and what they must have alike.

Each process runs the same command and has its own devices, which together make one mesh. Who they are comes
from arguments, from the environment, or from the cluster (SLURM, Open MPI, Kubernetes), as JAX detects it.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import pallas_kernels
from dsv4_jax.errors import EXIT_UNAVAILABLE, EXIT_USAGE, DistributedError, DSV4Error

PATIENCE = 6.0  # seconds for the coordinator to listen
JOIN_SECONDS = 300  # for all processes to come
HEARTBEAT_SECONDS = 100  # after which a process that says nothing counts as gone
_BY_HAND = "--coordinator HOST:PORT --num-processes N --process-id I"


@dataclasses.dataclass(frozen=True)
class Member:
    """Which of how many processes this one is.

    Attributes:
      coordinator: HOST:PORT where process 0 listens.
      processes: how many there are.
      number: this one's, from 0.
      local_device_ids: devices of this machine that are its own; None for all.
    """

    coordinator: str
    processes: int
    number: int
    local_device_ids: list[int] | None = None


def find_member(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Member:
    """Who this process is: as given, else as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say, else as the cluster does.

    Raises:
      DistributedError: nothing says it (69), or it cannot be so (2).
    """
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    devices = None
    if None in (coordinator, num_processes, process_id):
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, JOIN_SECONDS
        )
        coordinator, num_processes, process_id, devices = found
    names = ("a coordinator", "the number of processes", "the number of this process")
    missing = [
        name
        for name, each in zip(names, (coordinator, num_processes, process_id), strict=True)
        if each is None
    ]
    if coordinator is None or num_processes is None or process_id is None:
        raise DistributedError(
            f"no cluster was found that names {' and '.join(missing)}", hint=f"give {_BY_HAND}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"coordinator {coordinator!r} is not HOST:PORT", hint=f"give {_BY_HAND}", exit_code=EXIT_USAGE
        )
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"process {process_id} of {num_processes}: numbers go from 0 to {num_processes - 1}",
            hint=f"give {_BY_HAND}",
            exit_code=EXIT_USAGE,
        )
    return Member(coordinator, num_processes, process_id, list(devices) if devices else None)


def init_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: float = PATIENCE,
    join_seconds: int = JOIN_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Joins the other processes; to be called before JAX is used for anything. One process joins nobody.

    From then on a process that dies ends the others too, with exit code 69, once it has said nothing for
    `heartbeat_seconds`.

    Args:
      coordinator, num_processes, process_id: see `find_member`.
      patience: seconds to wait for the coordinator to listen.
      join_seconds: to wait for all processes then.
      say: is told what is waited for.

    Raises:
      DistributedError: the coordinator cannot be reached, or its port is taken (69). Where not all processes
        come, the program ends with that exit code.
    """
    member = find_member(coordinator, num_processes, process_id)
    if member.processes == 1:
        return
    # JAX ends the program where it cannot reach the coordinator: that one can is found out before.
    if member.number:
        _reach(member.coordinator, patience, say)
    else:
        _check_free(member.coordinator)
        say(f"waiting for {member.processes} processes at {member.coordinator}")
    who = f"process {member.number} of {member.processes}"
    _end_with(f"{who}: not all came to {member.coordinator} within {join_seconds} s, or two have one number")
    jax.distributed.initialize(
        member.coordinator,
        member.processes,
        member.number,
        local_device_ids=member.local_device_ids,
        initialization_timeout=join_seconds,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    _end_with(f"{who}: another one is gone (what is finished is written: run the same command again)")


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise DistributedError(f"{variable} is {text!r}, want a number", exit_code=EXIT_USAGE)
    return int(text)


def _reach(coordinator: str, patience: float, say: Callable[[str], None]) -> None:
    """Waits until something listens there."""
    host, _, port = coordinator.rpartition(":")
    deadline, waiting = time.monotonic() + patience, False
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(left, 0.1)).close()
            return
        except OSError as error:
            if left <= 0:
                raise DistributedError(
                    f"coordinator {coordinator} does not answer: {error.strerror or error}",
                    hint="is process 0 running there, and does the port get through?",
                ) from None
        if not waiting:
            say(f"waiting for the coordinator at {coordinator}")
            waiting = True
        time.sleep(0.2)


def _check_free(coordinator: str) -> None:
    """Sees to it that process 0 can listen."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"port {port} of coordinator {coordinator} cannot be used: {error.strerror}",
                hint="name another port",
            ) from None


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[object] = []  # what C calls must not be collected


def _end_with(message: str) -> None:
    """Has the program end with this message and our exit code where JAX would abort it.

    JAX knows no other way to end where processes are missing, and aborts from a thread of its own, so a
    handler in Python would never run.
    """

    def end(_: int) -> None:
        os.write(2, f"error: {message}\n".encode())
        os._exit(EXIT_UNAVAILABLE)

    _handlers.append(_Handler(end))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


def is_first() -> bool:
    """Whether this is the only process, or the one that reads and prints; asks for no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def lost_a_peer(error: BaseException) -> bool:
    """Whether this error says that another process is gone."""
    words = ("gloo", "nccl", "connection", "heartbeat", "unavailable", "socket", "peer")
    if not isinstance(error, jax.errors.JaxRuntimeError) or not jax.distributed.is_initialized():
        return False
    return any(word in str(error).lower() for word in words)


def leave(exit_code: int) -> None:
    """Ends this process without waiting for the others, as is right where they may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


# --- what must be alike


def agree(facts: Mapping[str, str | bytes]) -> None:
    """Holds facts of this process against those of the others, before any of them compiles for it.

    Raises:
      DistributedError: some of them differ; it names them, and a process that differs from the first.
    """
    if jax.process_count() == 1:
        return
    digests = [
        hashlib.sha256(each if isinstance(each, bytes) else each.encode()).digest() for each in facts.values()
    ]
    own = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    everyone = np.asarray(multihost_utils.process_allgather(own))
    alike = (everyone == everyone[0]).all(-1)  # [process, fact]
    if alike.all():
        return
    differing = [name for name, each in zip(facts, alike.T, strict=True) if not each.all()]
    process = int(np.argmin(alike.all(-1)))
    raise DistributedError(
        f"process {process} differs from process 0 in its {', '.join(differing)}",
        hint="all processes must run the same command on the same files",
    )


def from_first(data: bytes) -> bytes:
    """What the first process has here."""
    if jax.process_count() == 1:
        return data
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(data))] = np.frombuffer(data, np.uint8)[:length]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))


def first_reads[T](read: Callable[[], T]) -> T:
    """What `read` gives in the first process, a value that JSON can hold; the others do not read.

    Raises:
      DSV4Error: what the first process raised, there; a DistributedError with its exit code elsewhere.
    """
    if jax.process_count() == 1:
        return read()
    if jax.process_index() == 0:
        try:
            value = read()
        except DSV4Error as error:
            from_first(json.dumps({"failed": error.exit_code}).encode())
            raise
        from_first(json.dumps({"value": value}).encode())
        return value
    told = json.loads(from_first(b""))
    if "failed" in told:
        raise DistributedError("process 0 cannot go on, and says why", exit_code=told["failed"])
    return told["value"]


@functools.cache
def code_fingerprint() -> str:
    """Tells versions of this code, of its tables and of JAX apart."""
    digest = hashlib.sha256(jax.__version__.encode())
    for file in (__file__, pallas_kernels.__file__):
        root = Path(str(file)).parent
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
