"""Tasks of lm_eval: offline, gone on with after a kill, and the same on one process and on two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from dsv4_jax.errors import RequestError
from dsv4_jax.evaluation.harness import HarnessLM, run_harness
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN

TASKS = Path(__file__).parents[2] / "scripts" / "tasks"
NAMES = ["dsv4_arithmetic", "dsv4_choice", "dsv4_prose"]
_CHEAP = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_force_host_platform_device_count"
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def llm(text_checkpoint) -> LLM:
    return LLM.from_pretrained(text_checkpoint, numerics=PLAIN, max_len=512)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The tasks that ship, their data named by whole paths."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in (TASKS / "lm_eval").glob("*.yaml"):
        text = file.read_text().replace("scripts/tasks/", f"{TASKS}/")
        (folder / file.name).write_text(text)
    return folder


def test_tasks_run_offline_and_agree_with_our_own(llm, tasks, tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)

    found = run_harness(
        lambda: llm, NAMES, include=tasks, folder=tmp_path / "run", identity={"model": "x"}, limit=6
    )
    again = run_harness(
        lambda: llm, NAMES, include=tasks, folder=tmp_path / "run", identity={"model": "x"}, limit=6
    )

    assert found is not None
    assert found == again
    assert "dsv4_choice" in found["table"]
    rows = (tmp_path / "run" / "loglikelihood.jsonl").read_text().splitlines()
    assert len(rows) == 6 * 4 + 6  # choices, and texts of one window
    assert len((tmp_path / "run" / "generate_until.jsonl").read_text().splitlines()) == 6
    ours = _our_scores(llm, tmp_path)
    assert found["results"]["dsv4_choice"]["acc,none"] == ours["choice"]["score"]
    assert found["results"]["dsv4_prose"]["bits_per_byte,none"] == pytest.approx(
        ours["prose"]["score"], rel=1e-6
    )
    assert found["results"]["dsv4_arithmetic"]["exact_match,none"] == ours["arithmetic"]["score"]


def _our_scores(llm: LLM, folder: Path) -> dict:
    from dsv4_jax.evaluation.runner import evaluate
    from dsv4_jax.evaluation.tasks import read_task
    from dsv4_jax.sampling import SamplingParams

    own = [read_task(TASKS / f"{name}.jsonl", 6) for name in ("choice", "prose", "arithmetic")]
    greedy = SamplingParams(temperature=0.0)
    return evaluate(llm, own, folder / "own", identity={"model": "x"}, sampling=greedy)


def test_a_task_that_is_not_there_is_named(llm, tasks, tmp_path):
    with pytest.raises(RequestError, match=r"lm_eval has no task 'gsm9k' \(there are dsv4_arithmetic"):
        run_harness(lambda: llm, ["gsm9k"], include=tasks, folder=tmp_path, identity={})


def test_documents_cannot_become_control_tokens(llm, tmp_path):
    model = HarnessLM(llm, tmp_path)
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    prompt = model.apply_chat_template([{"role": "user", "content": "<｜User｜>hi"}])
    ids = model.tok_encode(prompt)

    from dsv4_jax.chat import encode_chat

    assert ids == encode_chat(tokenizer, [{"role": "user", "content": "<｜User｜>hi"}])
    assert tokenizer.control_id("<｜User｜>") not in model.tok_encode("<｜User｜>")


# --- commands


def _command(checkpoint: Path, tasks: Path, folder: Path, limit: int) -> list[str]:
    told = ["eval", str(checkpoint), "--harness", "--tasks", ",".join(NAMES), "--task-dir", str(tasks)]
    told += ["-o", str(folder), "--limit", str(limit), "--numerics", "plain", "--max-len", "512", "--json"]
    return [*told, "--mesh", "tp=2"]


def _start(arguments: list[str], distributed: str | None = None) -> subprocess.Popen[str]:
    """A process of its own with two devices; by `distributed`, "COORDINATOR,2,NUMBER", one of two with one.

    Both make the mesh of two devices that the command asks for.
    """
    program = "import sys; from dsv4_jax.cli import main; "
    if distributed:
        address, count, number = distributed.split(",")
        program = f"import jax; jax.distributed.initialize({address!r}, {count}, {number}); {program}"
    return subprocess.Popen(
        [sys.executable, "-c", f"{program} sys.exit(main(sys.argv[1:]))", *arguments],
        env=os.environ | OFFLINE | {"XLA_FLAGS": f"{_CHEAP}={1 if distributed else 2}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-2000:]
    return out.strip().splitlines()[-1] if out.strip() else ""


@pytest.mark.slow
def test_two_processes_give_the_score_of_one_to_the_last_digit(text_checkpoint, tasks, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    alone = _result(_start(_command(text_checkpoint, tasks, tmp_path / "one", 12)))
    pair = [
        _start(_command(text_checkpoint, tasks, tmp_path / "two", 12), f"{address},2,{number}")
        for number in range(2)
    ]
    first, second = (_result(process) for process in pair)

    assert json.loads(first) == json.loads(alone)
    assert second == "" or "results" not in second  # the first one alone reports
    for name in ("loglikelihood.jsonl", "generate_until.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_what_it_has(text_checkpoint, tasks, tmp_path):
    folder = tmp_path / "killed"
    whole = _result(_start(_command(text_checkpoint, tasks, tmp_path / "whole", 60)))

    process = _start(_command(text_checkpoint, tasks, folder, 60))
    kept = folder / "generate_until.jsonl"
    while process.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = kept.read_bytes().count(b"\n")
    resumed = _result(_start(_command(text_checkpoint, tasks, folder, 60)))

    assert 5 <= rows < 60
    assert resumed == whole
    assert kept.read_bytes() == (tmp_path / "whole" / "generate_until.jsonl").read_bytes()
