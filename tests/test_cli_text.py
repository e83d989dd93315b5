"""The commands that speak: text, files of prompts, conversations, tasks."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from dsv4_jax import batch
from dsv4_jax.cli import main
from dsv4_jax.cli.main import COMMANDS

# One layer, and one size of caches for every command here: they share what is compiled.
MODEL = ("--numerics", "plain", "--max-len", "256", "--max-batch", "2", "--invariant")
GREEDY = ("--temperature", "0", "--ignore-eos", "--max-tokens", "6")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], text_checkpoint: Path):
    """Runs a command on the text checkpoint: exit code, stdout, stderr."""

    def command(name: str, *arguments: str | Path, checkpoint: Path | None = None) -> tuple[int, str, str]:
        try:
            line = [name, checkpoint or text_checkpoint, *arguments]
            code = main([str(argument) for argument in line])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def write_lines(path: Path, *rows: dict | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_text_streams_and_is_what_json_says(run):
    code, out, err = run("generate", "-p", "the house", *GREEDY, *MODEL)
    _, told, _ = run("generate", "-p", "the house", *GREEDY, *MODEL, "--json")

    assert code == 0
    assert out == json.loads(told)["text"] + "\n"
    assert "tok/s" in err


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(run):
    _, told, _ = run("generate", "-p", "the house", *GREEDY, *MODEL, "--json")
    whole = json.loads(told)["text"]
    stop = whole[2:4]

    code, out, _ = run("generate", "-p", "the house", *GREEDY, *MODEL, "--stop", stop, "--stop", "never so")
    _, told, _ = run("generate", "-p", "the house", *GREEDY, *MODEL, "--stop", stop, "--json")

    assert code == 0
    assert out == whole[: whole.find(stop)] + "\n"
    answer = json.loads(told)
    assert answer["text"] == whole[: whole.find(stop)]
    assert (answer["finish_reason"], answer["stop_string"]) == ("stop", stop)
    assert len(answer["token_ids"]) < 6


PROMPTS = (
    {"id": "a", "prompt": "the house"},
    {"id": "b", "tokens": [5, 6, 7], "max_tokens": 3},
    {"id": "c", "messages": [{"role": "user", "content": "<｜User｜>"}], "thinking": True},
)


def test_a_file_is_answered_once_and_never_again(run, tmp_path):
    prompts, answers = write_lines(tmp_path / "prompts.jsonl", *PROMPTS), tmp_path / "answers.jsonl"
    command = ("generate", "-i", prompts, "-o", answers, *GREEDY, *MODEL)

    code, out, err = run(*command)
    written = answers.read_bytes()
    again, _, told = run(*command)
    answers.write_bytes(written[: written.rfind(b'{"id": "c"') + 20])
    torn, _, warned = run(*command)

    assert (code, again, torn) == (0, 0, 0)
    assert out == ""
    assert [json.loads(line)["id"] for line in written.splitlines()] == ["a", "b", "c"]
    assert "3 answers written" in err
    assert "0 answers written" in told
    assert "3 were there" in told
    assert "warning:" in warned
    assert "its last line was torn off" in warned
    assert answers.read_bytes() == written


def test_answers_of_other_settings_are_not_mixed_in(run, tmp_path):
    prompts, answers = write_lines(tmp_path / "prompts.jsonl", PROMPTS[1]), tmp_path / "answers.jsonl"
    run("generate", "-i", prompts, "-o", answers, *GREEDY, *MODEL)

    code, _, err = run("generate", "-i", prompts, "-o", answers, *GREEDY, *MODEL, "--temperature", "0.5")

    assert code == 65
    assert "answers of another run: sampling" in err
    assert err.strip().splitlines()[-1].startswith("error: ")


def test_bad_lines_are_skipped_if_asked_for(run, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS[1], "not JSON", {"id": "big", "tokens": [999]})

    refused, _, err = run("generate", "-i", prompts, *GREEDY, *MODEL)
    code, out, told = run("generate", "-i", prompts, *GREEDY, *MODEL, "--skip-bad")

    assert (refused, code) == (65, 0)
    assert f"{prompts}:2: is not JSON" in err
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["b"]
    assert f"skipped: {prompts}:2" in told
    assert f"skipped: {prompts}:3: token 0 is 999, outside [0, 512)" in told


def test_a_disk_that_is_full_says_how_to_go_on(run, tmp_path, monkeypatch):
    prompts, answers = write_lines(tmp_path / "prompts.jsonl", *PROMPTS), tmp_path / "answers.jsonl"

    def write(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(batch.os, "write", write)
    code, out, err = run("generate", "-i", prompts, "-o", answers, *GREEDY, *MODEL)

    assert (code, out) == (75, "")
    assert "No space left on device; its rows are whole, 3 are missing (make room and run the same" in err


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4_jax.cli.generate.load_llm", None)
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS[1])

    code, _, err = run("generate", "-i", prompts, "-o", tmp_path / "no such" / "answers.jsonl")

    assert code == 73
    assert "answers.jsonl cannot be written: No such file or directory" in err


def test_a_conversation_goes_on_line_by_line(run, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("hi\n\n/think\nwhat?\n/undo\nwhat else?\n/reset\nhi\n/exit\nnever\n")
    )

    code, out, err = run("chat", *GREEDY, *MODEL, "--system", "Be brief.", "--json")

    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["role"] for answer in answers] == ["assistant"] * 4
    first, second, third, fourth = (answer["prompt_tokens"] for answer in answers)
    assert first < second
    assert first < third
    assert first == fourth
    assert answers[1]["reasoning_content"]  # thinking was turned on
    assert "6 tokens, the first after" in err


def test_chat_prints_answers_as_text(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    _, told, _ = run("chat", *GREEDY, *MODEL, "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))

    code, out, _ = run("chat", *GREEDY, *MODEL)

    assert code == 0
    assert out == json.loads(told)["content"] + "\n" if told else False


def test_a_conversation_longer_than_the_cache_names_both_numbers(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\n"))

    code, _, err = run("chat", *GREEDY, *MODEL)

    assert code == 2
    assert "the conversation has 304 tokens and leaves no room to answer within max_len 256" in err


def test_a_checkpoint_without_tokenizer_cannot_chat(run, text_checkpoint, tmp_path):
    folder = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()

    code, _, err = run("chat", checkpoint=folder)

    assert code == 2
    assert "chat needs a tokenizer, and the checkpoint has no tokenizer.json" in err
    assert err.count("\n") == 1


TASK = (
    {"id": 1, "prompt": "2 + 3 =", "target": "5", "max_tokens": 3},
    {"id": 2, "prompt": "1 + 1 =", "target": ["2", "two"], "match": "contains", "max_tokens": 3},
)
CHOICE = tuple({"id": n, "prompt": "a b c", "choices": [" d", " e"], "answer": n % 2} for n in range(3))
TEXT = ({"text": "the house of the rising sun"}, {"text": "a man and a plan"})


def test_tasks_are_scored_and_a_second_run_asks_nothing(run, tmp_path):
    for name, rows in (("sums", TASK), ("pick", CHOICE), ("prose", TEXT)):
        write_lines(tmp_path / f"{name}.jsonl", *rows)
    command = ("eval", "--task-dir", tmp_path, "-o", tmp_path / "run", *MODEL, "--json", "--ignore-eos")

    code, out, _ = run(*command)
    _, again, _ = run(*command)

    found, repeated = json.loads(out)["tasks"], json.loads(again)["tasks"]
    assert code == 0
    assert {name: task["metric"] for name, task in found.items()} == {
        "pick": "accuracy",
        "prose": "bits_per_byte",
        "sums": "exact_match",
    }
    assert [task["new"] for task in repeated.values()] == [0, 0, 0]
    for name, task in found.items():
        assert repeated[name]["score"] == task["score"]
        low, high = task["interval"]
        assert low <= task["score"] <= high
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tasks"].keys() == found.keys()


def test_a_report_is_one_file_without_script_or_network(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name, rows in (("sums", TASK), ("pick", CHOICE), ("prose", TEXT)):
        write_lines(tmp_path / f"{name}.jsonl", *rows)

    code, _, err = run("eval", "--task-dir", tmp_path, "-o", tmp_path / "run", *MODEL, "--ignore-eos",
                       "--report", "--draft-tokens", "1")  # fmt: skip

    page = (tmp_path / "run" / "report.html").read_text()
    assert code == 0
    assert "report.html" in err
    for heading in ("Scores", "Speed", "Drafts that stood", "Load of the experts", "What the indexer chose"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img ") == 4
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_perplexity_of_files(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[0]["text"])
    lines = write_lines(tmp_path / "b.jsonl", TEXT[1])

    code, out, _ = run("ppl", tmp_path / "a.txt", lines, *MODEL, "--json")
    _, whole, _ = run("ppl", tmp_path / "a.txt", lines, *MODEL)
    _, windows, _ = run("ppl", tmp_path / "a.txt", lines, *MODEL, "--context", "8", "--json")

    found = json.loads(out)
    assert code == 0
    assert (found["n"], found["nbytes"]) == (2, len(TEXT[0]["text"] + TEXT[1]["text"]))
    assert whole.startswith(f"{found['score']:.4f} bits per byte")
    assert json.loads(windows)["tokens"] == found["tokens"]
    assert json.loads(windows)["score"] != found["score"]


def test_speed_is_measured(run):
    code, out, _ = run(
        "bench", "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1", *MODEL, "--json"
    )

    found = json.loads(out)
    assert code == 0
    assert found["new_tokens_per_second"] > 0
    assert found["prompt_tokens"] == 16


def test_the_doctor_lists_what_runs(capsys):
    code = main(["doctor", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["versions"]["jax"]
    functions = {verdict["function"] for verdict in found["kernels"]}
    assert functions >= {"expert_mlp", "block_matmul", "sparse_attention", "index_select", "route_by_score"}
    assert all(
        verdict["default"] == (verdict["implementation"] == "reference") for verdict in found["kernels"]
    )


@pytest.mark.parametrize(
    ("command", "arguments", "code", "said"),
    [
        ("eval", ["-o", "x"], 2, "nothing to evaluate (name --tasks, or a --task-dir)"),
        ("eval", ["-o", "x", "--tasks", "no.jsonl"], 66, "task file no.jsonl cannot be read"),
        ("eval", ["-o", "x", "--tasks", "sums"], 66, "no task is called 'sums'"),
        ("eval", ["-o", "x", "--tasks", "a.jsonl", "--limit", "0"], 2, "--limit must be at least 1"),
        ("eval", ["--tasks", "a"], 2, "required: -o/--output"),
        ("ppl", ["no.txt"], 66, "no.txt cannot be read"),
        ("bench", ["--batch", "x"], 2, "--batch 'x' is not a list of integers >= 1"),
        ("bench", ["--new-tokens", "1"], 2, "bench needs"),
        ("generate", ["-p", "a", "--stop", ""], 2, "stop must be texts that are not empty"),
        ("generate", ["-p", "a", "--skip-bad"], 2, "--skip-bad goes with -i"),
        ("generate", ["-p", ""], 2, "--prompt is empty"),
        ("generate", ["-p", "a\udcff"], 2, "lone surrogate"),
        ("chat", ["--effort", "huge"], 2, "invalid choice: 'huge'"),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_line_and_a_code(run, command, arguments, code, said):
    found, out, err = run(command, *arguments)

    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [each.__name__.rpartition(".")[2] for each in COMMANDS])
def test_every_command_has_help_with_examples(capsys, command):
    name = "eval" if command == "evaluate" else command
    with pytest.raises(SystemExit):
        main([name, "--help"])

    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert f"dsv4-jax {name}" in shown
    assert "--json" in shown
