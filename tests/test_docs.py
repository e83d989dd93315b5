"""What the documentation tells users to type and to write runs, on a small made-up model."""

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import dsv4_jax
from dsv4_jax.cli import main
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/chat.md", "docs/evaluation.md", "docs/multihost.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[str]:
    """Lines that call dsv4-jax, without the words of explanation after them."""
    lines = [line for block in blocks(page, "") for line in re.sub(r"\\\n *", "", block).splitlines()]
    called = (line.removeprefix("$ ") for line in lines)
    return [line.partition("   ")[0].strip() for line in called if re.match(r"(echo .*\| )?dsv4-jax ", line)]


COMMANDS = list({line: (page, line) for page in PAGES for line in commands(page)}.values())


@pytest.fixture(scope="module")
def llm(text_checkpoint: Path) -> LLM:
    return LLM.from_pretrained(text_checkpoint, numerics=PLAIN, max_len=128, max_batch=2, invariant=True)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: LLM) -> Path:
    """A folder with what the commands name; loading gives the small model at once."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi", "max_tokens": 3}\n')
    for name in ("book.txt", "notes.txt"):
        (tmp_path / name).write_text("the house of the rising sun")
    (tmp_path / "prose.jsonl").write_text('{"text": "a man and a plan"}\n')
    (tmp_path / "mine.jsonl").write_text('{"prompt": "hi", "target": "x"}\n')
    tasks = tmp_path / "scripts" / "tasks"
    tasks.mkdir(parents=True)
    for file in (ROOT / "scripts" / "tasks").glob("*.jsonl"):
        if file.stem != "prose":  # longer than the model that stands in
            (tasks / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    shutil.copytree(ROOT / "scripts" / "tasks" / "lm_eval", tasks / "lm_eval")
    (tmp_path / "my_tasks").mkdir()
    task = (tasks / "lm_eval" / "dsv4_choice.yaml").read_text().replace("dsv4_choice", "my_task")
    (tmp_path / "my_tasks" / "my_task.yaml").write_text(task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LLM, "from_pretrained", lambda *_, **__: llm)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_a_command_of_the_docs_runs(page, command, desk, text_checkpoint, monkeypatch, capsys):
    said, _, line = command.rpartition("| ") if "| " in command else ("echo hi", "", command)
    words = shlex.split(re.sub("CHECKPOINT|DeepSeek-V4-Pro", str(text_checkpoint), line))
    if "--coordinator" in words:  # this one alone, with the devices that there are
        monkeypatch.setattr(sys.modules[main.__module__], "join", lambda _: None)
        words[words.index("--mesh") + 1] = "tp=8"
    monkeypatch.setattr("dsv4_jax.cli.doctor.check_kernels", lambda **_: iter(()))  # in test_cli_text.py
    if "--harness" in words:
        pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--report" in words:
        pytest.importorskip("matplotlib", reason="needs the extra 'report'")
    if words[1] == "bench":
        words += ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    if words[1] in ("chat", "generate", "eval"):
        words += ["--max-tokens", "3"]
    if words[1:2] == ["generate"] and "-p" not in words and "--prompt" not in words and "-i" not in words:
        pytest.skip("a line of a form")
    monkeypatch.setattr("sys.stdin", io.StringIO(shlex.split(said)[1] + "\n"))

    code = main(words[1:])

    assert code == 0, capsys.readouterr().err


def test_what_the_docs_show_of_a_plan_is_what_it_says(capsys):
    (block,) = [each for each in blocks("docs/multihost.md", "") if each.startswith("$ dsv4-jax plan")]
    command, _, shown = block.partition("\n")

    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("page", "block"),
    [(page, block) for page in PAGES for block in blocks(page, "python") if "from_pretrained" in block],
    ids=lambda value: value if value in PAGES else "",
)
def test_python_of_the_docs_runs(page, block, llm, monkeypatch):
    monkeypatch.setattr(dsv4_jax.LLM, "from_pretrained", lambda *_, **__: llm)
    short = dsv4_jax.SamplingParams(max_tokens=3)
    monkeypatch.setattr(dsv4_jax, "SamplingParams", lambda **_: short)
    chat = llm.chat
    monkeypatch.setattr(llm, "chat", lambda messages, **how: chat(messages, short, **how))

    exec(block, {})


def test_pictures_and_files_of_the_docs_are_there():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert ((ROOT / page).parent / name).is_file(), f"{page}: {name}"
        for name in re.findall(r"`((?:scripts|docs|tests)/[\w./]+\.(?:py|sh|md|json|jsonl))`", text):
            assert (ROOT / name).is_file(), f"{page}: {name}"
