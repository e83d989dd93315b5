"""The command as a user runs it: exit codes, stdout and stderr."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.cli import main
from dsv4_jax.errors import RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.weight_files import WeightFiles

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "tiny-fp4"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The golden checkpoint copied, so that a test can spoil a file of it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_generate_gives_the_tokens_of_the_official_implementation(capsys):
    with np.load(GOLDEN / "expected.npz") as expected:
        prompt, tokens = expected["in/greedy37/prompt"][0], expected["greedy37/tokens"][0]

    code, out, err = run(
        capsys, "generate", GOLDEN, "--tokens", ",".join(map(str, prompt)), "--max-tokens", "32",
        "--temperature", "0", "--ignore-eos", "--numerics", "plain", "--json", "--logprobs",
    )  # fmt: skip

    answer = json.loads(out)
    assert code == 0
    assert answer["token_ids"] == tokens.tolist()
    assert answer["finish_reason"] == "length"
    assert answer["text"] is None
    assert len(answer["logprobs"]) == 32
    assert answer["logprob_sum"] == pytest.approx(sum(answer["logprobs"]))
    assert answer["timings"]["tokens"] == 32
    assert "tok/s" in err


def test_generate_compiles_nothing_that_warmup_has_compiled(tmp_path, text_checkpoint):
    programs = tmp_path / "programs"
    sizes = ["--max-len", "128", "--max-batch", "2", "--numerics", "plain", "--compile-cache", programs]

    def command(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "dsv4_jax", name, text_checkpoint, *arguments, *sizes]
        return subprocess.run([str(part) for part in line], capture_output=True, text=True, check=True)

    def kept() -> list[str]:
        return sorted(path.name for path in programs.iterdir() if path.name.endswith("-cache"))

    warmed = command("warmup")
    before = kept()
    answered = command("generate", "--tokens", "3,4,5", "--max-tokens", "4", "--temperature", "0", "--json")

    assert "programs ready in" in warmed.stderr
    assert len(before) >= 3  # pieces of prompts, first tokens, decode steps
    assert kept() == before
    assert len(json.loads(answered.stdout)["token_ids"]) == 4


def test_the_module_is_the_command():
    run = [sys.executable, "-m", "dsv4_jax", "inspect", str(GOLDEN), "--json"]

    done = subprocess.run(run, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert json.loads(done.stdout)["missing"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tokens", ""], 2, "empty"),
        (["--tokens", "1,x"], 2, "--tokens '1,x' is not a list of integers"),
        (["--tokens", "1,2.5"], 2, "not a list of integers"),
        (["--tokens=-1,3"], 2, "--tokens: token 0 is -1, outside [0, 512)"),
        (["--tokens", "1,512"], 2, "--tokens: token 1 is 512, outside [0, 512)"),
        (["--tokens", "1,2", "--max-tokens", "2000"], 2, "max_len 1024"),
        (["--tokens", "1,2", "--max-len", "16", "--max-tokens", "15"], 2, "max_tokens 15"),
        (["--tokens", "1", "--max-len", "5000"], 2, "max_len must be in [1, 1024]"),
        (["--prompt", "hello"], 2, "no tokenizer.json"),
        (["--tokens", "1", "--temperature", "-1"], 2, "temperature must be a finite number >= 0, got -1.0"),
        (["--tokens", "1", "--temperature", "nan"], 2, "temperature must be"),
        (["--tokens", "1", "--temperature", "inf"], 2, "temperature must be"),
        (["--tokens", "1", "--top-p", "0"], 2, "top_p must be in (0, 1], got 0.0"),
        (["--tokens", "1", "--top-p", "1.5"], 2, "top_p must be in (0, 1], got 1.5"),
        (["--tokens", "1", "--top-k", "-2"], 2, "top_k must be"),
        (["--tokens", "1", "--max-tokens", "0"], 2, "max_tokens must be an integer >= 1, got 0"),
        (["--tokens", "1", "--seed", "-1"], 2, "seed must be"),
        (["--tokens", "1", "-o", "x.jsonl"], 2, "-o goes with -i"),
        (["--tokens", "1", "--prefix-bytes", "-1"], 2, "prefix_bytes must be at least 0, got -1"),
        (["--tokens", "1", "--prefix-bytes", "9"], 77, "prefix_bytes=9 do not hold a piece of 512 tokens"),
        (["--tokens", "1", "--mesh", "tp=3"], 2, "tp = 3"),
        (["--tokens", "1", "--mesh", "pp=2"], 2, "not tp=N, ep=N or dp=N"),
        (["--tokens", "1", "--implementation", "cutlass"], 2, "no op has an implementation 'cutlass', have "),
        (["--tokens", "1", "--implementation", "moe=triton"], 2, "no op is called 'moe', have "),
        (["--tokens", "1", "--implementation", "swiglu=mma"], 2, "swiglu has no implementation 'mma', have "),
        (["--tokens", "1", "--implementation", "triton"], 2, "triton needs a GPU"),
        (["-i", "no_such.jsonl"], 66, "no_such.jsonl"),
        ([], 2, "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_a_code(capsys, arguments, code, said):
    found, out, err = run(capsys, "generate", GOLDEN, *arguments)

    assert found == code
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_the_models_options_arrive(capsys, monkeypatch):
    given = {}

    def from_pretrained(folder: Path, **options: object) -> None:
        given.update(options)
        raise RequestError("seen")

    monkeypatch.setattr(LLM, "from_pretrained", from_pretrained)

    code, _, _ = run(capsys, "generate", GOLDEN, "--tokens", "1", "--invariant", "--prefix-bytes", "4096",
                     "--max-len", "64", "--max-batch", "3", "--draft-tokens", "2")  # fmt: skip

    assert code == 2
    expected = {"invariant": True, "prefix_bytes": 4096, "max_len": 64, "max_batch": 3, "draft_tokens": 2}
    assert given.items() >= expected.items()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda folder: folder / "no such place", 66, "no such directory"),
        (lambda folder: folder / "config.json", 66, "a file, not a folder"),
        (lambda folder: (folder / "config.json").unlink(), 66, "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), 65, "config.json:1:2"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), 65, "no model.safetensors.index"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), 66, "absent"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(b""), 65, "0 bytes"),
    ],
    ids=[
        "a folder that is not there",
        "a file",
        "no config",
        "a config that is not JSON",
        "no index",
        "a shard that is absent",
        "an empty shard",
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_broken_checkpoint_is_one_line_and_a_code(capsys, checkpoint, command, change, code, said):
    changed = change(checkpoint)
    folder = changed if isinstance(changed, Path) else checkpoint
    arguments = ["--tokens", "1,2"] if command == "generate" else []

    found, out, err = run(capsys, command, folder, *arguments)

    assert (found, out) == (code, "")
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_logits_that_are_not_finite_end_the_command_with_their_own_code(capsys, checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"]["hc_head_scale"]
    spoil(shard, "hc_head_scale", np.float32("nan").tobytes())

    code, out, err = run(capsys, "generate", checkpoint, "--tokens", "1,2", "--max-tokens", "2", "--json",
                         "--numerics", "plain")  # fmt: skip
    verified, _, found = run(capsys, "generate", checkpoint, "--tokens", "1,2", "--verify", "values")

    assert code == 70
    assert json.loads(out)["finish_reason"] == "error"
    assert "logits of request 0 (after 0 tokens) were not finite numbers" in err
    assert verified == 70
    assert "hc_head_scale" in found


def spoil(shard: Path, tensor: str, value: bytes) -> None:
    """Overwrites the first bytes of a tensor in its file."""
    with WeightFiles.open(shard.parent) as files:
        offset = files.tensors[tensor].offset
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(value)
