"""Who a process is, and what it says before it joins the others."""

import socket
import time

import jax
import pytest

from dsv4_jax.cli.options import _mesh
from dsv4_jax.distributed import agree, find_member, first_reads, from_first, init_distributed, is_first
from dsv4_jax.errors import DistributedError, MemoryPlanError

WHO = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Neither a cluster nor variables that say who this process is."""
    for name in (*WHO, "SLURM_JOB_ID", "SLURM_PROCID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("who", "code", "message"),
    [
        (
            (None, None, None),
            69,
            "no cluster was found that names a coordinator and the number of processes and",
        ),
        (
            ("a:1", 2, None),
            69,
            "no cluster was found that names the number of this process (give --coordinator",
        ),
        (("here", 2, 0), 2, "coordinator 'here' is not HOST:PORT (give --coordinator HOST:PORT"),
        (("here:port", 2, 0), 2, "'here:port' is not HOST:PORT"),
        (("here:70000", 2, 0), 2, "'here:70000' is not HOST:PORT"),
        (("a:1", 2, 2), 2, "process 2 of 2: numbers go from 0 to 1"),
        (("a:1", 2, -1), 2, "process -1 of 2"),
        (("a:1", 0, 0), 2, "process 0 of 0"),
    ],
)
def test_who_a_process_is_must_be_said_whole_and_right(who, code, message):
    with pytest.raises(DistributedError) as caught:
        find_member(*who)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


def test_arguments_go_before_the_environment(monkeypatch):
    for name, value in zip(WHO, ("there:1234", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)

    assert find_member().coordinator == "there:1234"
    assert (find_member().processes, find_member().number) == (4, 3)
    assert find_member("here:99", 8, 5).coordinator == "here:99"
    assert (find_member(process_id=0).processes, find_member(process_id=0).number) == (4, 0)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")

    with pytest.raises(DistributedError, match="JAX_NUM_PROCESSES is 'two', want a number"):
        find_member("a:1", None, 0)


def test_slurm_says_who_a_process_is(monkeypatch):
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2"}
    for name, value in (variables | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")

    member = find_member()

    assert member.coordinator.startswith("node3:")
    assert (member.processes, member.number) == (2, 1)


def test_a_coordinator_that_does_not_answer_is_told():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    said: list[str] = []
    begin = time.monotonic()

    with pytest.raises(DistributedError, match=f"coordinator {address} does not answer: Connection refused"):
        init_distributed(address, 2, 1, patience=0.5, say=said.append)

    assert 0.5 < time.monotonic() - begin < 3
    assert said == [f"waiting for the coordinator at {address}"]


def test_a_host_that_does_not_exist_is_told():
    with pytest.raises(DistributedError, match=r"no-such-host\.invalid:1 does not answer"):
        init_distributed("no-such-host.invalid:1", 2, 1, patience=0.1)


def test_a_port_that_is_taken_is_told():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(
            DistributedError, match=f"port {port} of coordinator .* cannot be used: Address"
        ) as caught:
            init_distributed(f"127.0.0.1:{port}", 2, 0)

    assert caught.value.exit_code == 69


def test_one_process_joins_nobody_and_agrees_with_itself():
    init_distributed("a:1", 1, 0)

    assert not jax.distributed.is_initialized()
    assert is_first()
    agree({"seed": "1"})
    assert from_first(b"x") == b"x"
    assert first_reads(lambda: [1]) == [1]


def test_a_mesh_that_leaves_devices_of_several_processes_idle_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    with pytest.raises(
        MemoryPlanError, match="--mesh of 4 devices leaves 4 of 8 in 2 processes idle"
    ) as caught:
        _mesh({"tp": 4})

    assert caught.value.exit_code == 2
    assert _mesh({"tp": 4, "dp": 2}).size == 8
