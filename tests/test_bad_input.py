"""What users get wrong, case by case: an exit code, one line that names the cause and the mend, no traceback.

The numbers are those of a list that the project began with. Each case goes through the command itself; what
an error looks like from Python, and variants of the cases, are in the tests of the modules.
"""

# ruff: noqa: E501  (a case is a line)

import dataclasses
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import batch
from dsv4_jax.chat.made_up import made_up_tokenizer
from dsv4_jax.cli import main
from dsv4_jax.llm import LLM
from dsv4_jax.weight_files import WeightFiles

Place = Any  # what a case makes of the checkpoint: another path to name, or None
TOKENS = ("--tokens", "5,6", "--max-tokens", "2")


@dataclasses.dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
      number, name: of the case.
      spoil: does it to a good checkpoint folder; gives the path to name instead, if it is another.
      code: exit code.
      said: parts of the line: what was found, and how to mend it.
      command: by default generating two tokens.
    """

    number: int
    name: str
    spoil: Callable[[Path], Place]
    code: int
    said: tuple[str, ...]
    command: tuple[str, ...] = ("generate", *TOKENS)


def nothing(_: Path) -> None:
    """The checkpoint is good: the mistake is in the command."""


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes keys of config.json; None takes one out."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        keys = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))

    return spoil


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"


def index(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes the weight map, or replaces it by what `change` gives."""

    def spoil(folder: Path) -> None:
        whole = json.loads((folder / INDEX).read_text())
        weight_map = change(whole["weight_map"])
        (folder / INDEX).write_text(json.dumps(whole | {"weight_map": weight_map}))

    return spoil


def renamed(shard: str) -> Callable[[Path], None]:
    return index(lambda weight_map: {**weight_map, "norm.weight": shard})


def header(change: Callable[[dict], Any], name: str = SHARD) -> Callable[[Path], None]:
    """Rewrites a shard's header."""

    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def without(tensor: str) -> Callable[[Path], None]:
    """A folder that lacks a tensor altogether; its bytes stay, under a name that is no one's."""

    def spoil(folder: Path) -> None:
        header(lambda entries: entries.update({"no.such.name": entries.pop(tensor)}))(folder)
        index(lambda names: {("no.such.name" if name == tensor else name): at for name, at in names.items()})(
            folder
        )

    return spoil


def value(tensor: str, content: bytes) -> Callable[[Path], None]:
    """Overwrites the first bytes of a tensor."""

    def spoil(folder: Path) -> None:
        with WeightFiles.open(folder) as files:
            info = files.tensors[tensor]
        with info.file.open("r+b") as file:
            file.seek(info.offset)
            file.write(content)

    return spoil


def moved(folder: Path) -> Path:
    """A shard that is a link to a file elsewhere."""
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / SHARD).rename(elsewhere)
    (folder / SHARD).symlink_to(elsewhere)
    return folder


def cut(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def prompts(*lines: bytes) -> Callable[[Path], None]:
    return write("prompts.jsonl", b"\n".join(lines) + b"\n")


def answered(folder: Path, *rows: str, told: str | None = '{"model": "other"}') -> None:
    prompts(b'{"id": "a", "tokens": [5]}')(folder)
    (folder / "out.jsonl").write_text("".join(row + "\n" for row in rows))
    if told is not None:
        (folder / "out.jsonl.run.json").write_text(told)


NAN = np.float32("nan").tobytes()
FILE = ("generate", "-i", "{}/prompts.jsonl", "--max-tokens", "2")
TO_FILE = (*FILE, "-o", "{}/out.jsonl")
GOOD, NORM = b'{"tokens": [5, 6]}', "layers.0.attn_norm.weight"
HTML = b"<!DOCTYPE html><html>Not found</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:97d2\nsize 7\n"

CASES = [
    Case(1, "a path that does not exist", lambda f: f / "nope", 66, ("no such directory", "Hugging Face")),
    Case(2, "a file", lambda f: f / "config.json", 66, ("a file, not a folder",)),
    Case(2, "a GGUF", lambda f: shutil.copy(f / SHARD, f / "m.gguf") and f / "m.gguf", 66, ("GGUF is not supported",)),
    Case(3, "no config.json", lambda f: (f / "config.json").unlink(), 66, ("config.json: no such file",)),
    Case(4, "an empty config.json", write("config.json", ""), 65, ("config.json:1:1: empty", "download it again")),
    Case(4, "a config.json that is no JSON", write("config.json", '{"a": 1,\n x'), 65, ("config.json:2:2",)),
    Case(4, "a config.json that is a list", write("config.json", "[]"), 65, ("config.json", "object")),
    Case(5, "another model", config(model_type="llama"), 65, ("llama", "deepseek_v4")),
    Case(6, "keys that are missing", config(compress_ratios=None, o_groups=None), 65, ("compress_ratios", "o_groups")),
    Case(7, "a number as text", config(hidden_size="7168"), 65, ("hidden_size", "'7168'")),
    Case(7, "a negative number", config(num_hidden_layers=-1), 65, ("num_hidden_layers", "-1")),
    Case(8, "too few compress_ratios", config(compress_ratios=[4]), 65, ("compress_ratios",)),
    Case(8, "an unknown ratio", config(compress_ratios=[5, 0]), 65, ("compress_ratios", "5")),
    Case(9, "a mesh that does not divide", nothing, 2, ("tp = 3",), ("generate", *TOKENS, "--mesh", "tp=3")),
    Case(10, "absurd sizes", config(hidden_size=2**40), 65, ("hidden_size", str(2**40))),
    Case(11, "another quantisation", config(quantization_config={"quant_method": "awq"}), 65, ("awq",)),
    Case(12, "a config.json of 11 MB", write("config.json", b"{" + b" " * 11_000_000 + b"}"), 65, ("longer than",)),
    Case(12, "a config.json that is deep", write("config.json", "[" * 100_000), 65, ("config.json",)),
    Case(13, "no index", lambda f: ((f / INDEX).unlink(), shutil.copy(f / SHARD, f / "b.safetensors")), 65, ("no model.safetensors.index",)),
    Case(14, "a weight_map that is a list", index(lambda _: ["a"]), 65, ("weight_map",)),
    Case(14, "an empty weight_map", index(lambda _: {}), 65, ("weight_map",)),
    Case(14, "a shard's name that is a number", renamed(7), 65, ("norm.weight",)),  # type: ignore[arg-type]
    Case(15, "a shard above the folder", renamed("../../etc/passwd"), 65, ("escapes", "../../etc/passwd")),
    Case(15, "a shard by a whole path", renamed("/etc/passwd"), 65, ("escapes", "/etc/passwd")),
    Case(15, "a shard by a detour", renamed("a/../../b.safetensors"), 65, ("escapes",)),
    Case(16, "a link to elsewhere", moved, 65, (SHARD,)),
    Case(17, "a pickle", renamed("pytorch_model.bin"), 65, ("pickle weights are never loaded",)),
    Case(18, "absent shards", index(lambda m: {**m, "x": "b.safetensors", "y": "c.safetensors"}), 66, ("b.safetensors", "c.safetensors")),
    Case(19, "a Git LFS pointer", write(SHARD, LFS), 65, ("git lfs pull",)),
    Case(20, "a web page in place of a shard", write(SHARD, HTML), 65, (SHARD,)),
    Case(20, "an empty shard", write(SHARD, b""), 65, ("0 bytes",)),
    Case(20, "half a shard", cut, 65, (SHARD, "bytes")),
    Case(21, "a header longer than the file", write(SHARD, struct.pack("<Q", 999) + b"{}"), 65, (SHARD,)),
    Case(21, "a header that is no JSON", write(SHARD, struct.pack("<Q", 8) + b"{nope}  "), 65, (SHARD,)),
    Case(22, "tensors that overlap", header(lambda e: e[NORM].update(data_offsets=[0, e[NORM]["data_offsets"][1] - e[NORM]["data_offsets"][0]])), 65, (SHARD,)),
    Case(22, "offsets the wrong way round", header(lambda e: e[NORM]["data_offsets"].reverse()), 65, (SHARD,)),
    Case(23, "a shape of other bytes", header(lambda e: e[NORM].update(shape=[3])), 65, (SHARD,)),
    Case(23, "a shape that overflows", header(lambda e: e[NORM].update(shape=[2**40, 2**40])), 65, (SHARD,)),
    Case(24, "a tensor that its shard lacks", index(lambda m: {**m, "more": SHARD}), 65, ("more",)),
    Case(25, "a tensor that is missing", without(NORM), 65, ("lacks " + NORM, "download the whole")),
    Case(25, "a tensor too many, with --strict", without("mtp.0.enorm.weight"), 65, ("no.such.name",), ("generate", *TOKENS, "--strict")),
    Case(26, "a tensor of another dtype", header(lambda e: e[NORM].update(dtype="F16")), 65, (NORM, "F16", "BF16")),
    Case(27, "a weight without its scale", without("layers.0.attn.wq_a.scale"), 65, ("layers.0.attn.wq_a.scale",)),
    Case(28, "a norm that is NaN", value(NORM, np.array(np.nan, ml_dtypes.bfloat16).tobytes()), 70, (NORM,), ("generate", *TOKENS, "--verify", "values")),
    Case(28, "a scale that is NaN", value("layers.0.attn.wq_a.scale", b"\xff"), 70, ("wq_a",), ("generate", *TOKENS, "--verify", "values")),
    Case(30, "a tokenizer.json that is a pointer", write("tokenizer.json", LFS), 65, ("Git LFS pointer", "git lfs pull")),
    Case(30, "a tokenizer.json of no sort", write("tokenizer.json", "{"), 65, ("is not a tokenizer", "download it")),
    Case(30, "a tokenizer of another model", write("tokenizer.json", made_up_tokenizer(600).to_str()), 65, ("has 600 tokens", "the model has 512", "of the same checkpoint")),
    Case(31, "a token below 0", nothing, 2, ("token 0 is -1, outside [0, 512)",), ("generate", "--tokens=-1")),
    Case(31, "a token past the vocabulary", nothing, 2, ("token 1 is 512",), ("generate", "--tokens", "1,512")),
    Case(31, "half a token", nothing, 2, ("not a list of integers", "as in"), ("generate", "--tokens", "1,2.5")),
    Case(32, "an empty prompt", nothing, 2, ("--prompt is empty", "at least one"), ("generate", "-p", "")),
    Case(32, "a prompt that fills the cache", nothing, 2, ("4 tokens", "max_len 4", "shorten"), ("generate", "--tokens", "1,2,3,4", "--max-len", "4")),
    Case(32, "too little room for the answer", nothing, 2, ("max_tokens 4", "max_len 4", "lower max_tokens to 3"), ("generate", "--tokens", "1", "--max-len", "4", "--max-tokens", "4")),
    Case(33, "a temperature below 0", nothing, 2, ("temperature must be a finite number >= 0",), ("generate", *TOKENS, "--temperature", "-1")),
    Case(33, "a temperature that is none", nothing, 2, ("temperature must be",), ("generate", *TOKENS, "--temperature", "nan")),
    Case(33, "a top_p of 0", nothing, 2, ("top_p must be in (0, 1], got 0.0",), ("generate", *TOKENS, "--top-p", "0")),
    Case(33, "a top_k below 0", nothing, 2, ("top_k must be",), ("generate", *TOKENS, "--top-k", "-2")),
    Case(33, "no tokens", nothing, 2, ("max_tokens must be an integer >= 1",), ("generate", "--tokens", "1", "--max-tokens", "0")),
    Case(33, "an empty stop string", nothing, 2, ("stop must be texts",), ("generate", *TOKENS, "--stop", "")),
    Case(35, "a role that there is not", prompts(b'{"messages": [{"role": "robot", "content": "a"}]}'), 65, (":1: messages[0]: unknown role 'robot'", "known are"), FILE),
    Case(35, "a tool's result without a call", prompts(b'{"messages": [{"role": "tool", "content": "a"}]}'), 65, ("no assistant message before it calls a tool",), FILE),
    Case(35, "half a character", nothing, 2, ("lone surrogate",), ("generate", "-p", "a\udcff")),
    Case(36, "a bad line", prompts(*[GOOD] * 16, b"{nope"), 65, ("prompts.jsonl:17: is not JSON",), FILE),
    Case(36, "an id twice", prompts(b'{"id": 1, "tokens": [5]}', b'{"id": 1, "tokens": [6]}'), 65, (":2: id 1 is already that of line 1",), FILE),
    Case(37, "answers of another model", lambda f: answered(f, '{"id": "b"}'), 65, ("answers of another run: model 'other', now", "name another"), TO_FILE),
    Case(37, "a file that is no answers", lambda f: answered(f, "nope"), 65, ("out.jsonl:1: is not a row",), TO_FILE),
    Case(37, "a folder that is not there", prompts(GOOD), 73, ("cannot be written: No such file", "name a file"), (*FILE, "-o", "{}/no such/out.jsonl")),
]  # fmt: skip
# Cases that need more than a folder and a command: the tests that they are.
ELSEWHERE = {
    29: {"checkpoint/test_load.py": ["a_hash_table_that_names_an_expert_the_model_lacks_is_refused"]},
    34: {"chat/test_encoding.py": ["ten_thousand_texts_that_spell_control_tokens_stay_text"]},
    40: {
        "checkpoint/test_convert.py": [
            "a_killed_conversion_goes_on",
            "a_folder_that_holds_something_is_refused_unless_it_may_be_overwritten",
            "a_relative_path_is_resolved",
        ]
    },
    41: {
        "checkpoint/test_convert.py": [
            "loading_with_full_verification_finds_a_flipped_bit_and_names_its_file",
            "without_a_manifest_it_loads_with_a_warning",
            "a_damaged_checkpoint_is_refused_in_one_line",  # an older format among them
        ]
    },
    42: {
        "distributed/test_processes.py": [
            "a_coordinator_that_is_down_is_told_within_ten_seconds",
            "processes_that_differ_stop_before_they_compile_and_say_in_what",
            "a_killed_process_ends_the_other_and_what_is_finished_stays",
        ],
        "distributed/test_joining.py": ["a_port_that_is_taken_is_told"],
    },
}


def test_each_of_the_42_cases_is_a_test():
    here = re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(), re.MULTILINE)

    assert {*ELSEWHERE, *map(int, here), *(case.number for case in CASES)} == set(range(1, 43))
    for file, names in [each for files in ELSEWHERE.values() for each in files.items()]:
        text = (Path(__file__).parent / file).read_text()
        assert all(f"def test_{name}(" in text for name in names)


@pytest.fixture
def folder(text_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(text_checkpoint, tmp_path / "checkpoint")


def run(capsys: pytest.CaptureFixture[str], folder: Path, command: tuple[str, ...]) -> tuple[int, str, str]:
    name, *arguments = (part.replace("{}", str(folder)) for part in command)
    try:
        code = main([name, str(folder), *arguments])
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def assert_one_line(err: str, said: tuple[str, ...]) -> None:
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "generating; "))]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in said:
        assert part in lines[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number} {case.name}")
def test_a_mistake_is_one_line_and_a_code(capsys, folder, case):
    place = case.spoil(folder)

    code, out, err = run(
        capsys, place if isinstance(place, Path) and place != folder else folder, case.command
    )

    assert (code, out) == (case.code, "")
    assert_one_line(err, case.said)


def test_11_an_unknown_key_is_a_warning(capsys, folder):
    config(a_new_key=1)(folder)

    code, _, err = run(capsys, folder, ("inspect",))

    assert code == 0
    assert "warning: " in err
    assert "a_new_key" in err


def test_25_a_tensor_too_many_is_a_warning(capsys, folder, monkeypatch):
    without("mtp.0.enorm.weight")(folder)
    monkeypatch.setattr(LLM, "stream", lambda *_, **__: iter(()))

    code, _, err = run(capsys, folder, ("generate", *TOKENS))

    assert code == 0
    assert "no.such.name" in err


def test_36_byte_order_mark_and_windows_line_ends_are_taken(capsys, folder):
    (folder / "prompts.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD + b"\r\n")

    code, out, _ = run(capsys, folder, (*FILE, "--numerics", "plain"))

    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 3]


def test_37_a_full_disk_can_be_gone_on_from(capsys, folder, monkeypatch):
    def no_room(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    prompts(GOOD)(folder)
    monkeypatch.setattr(batch.os, "write", no_room)

    code, out, err = run(capsys, folder, (*TO_FILE, "--numerics", "plain"))

    assert (code, out) == (75, "")
    assert_one_line(err, ("No space left on device", "make room and run the same command again"))


def test_38_what_does_not_fit_is_refused_before_it_is_read(capsys, folder, monkeypatch):
    monkeypatch.setattr("dsv4_jax.llm.free_bytes", lambda: 1000)
    monkeypatch.setattr("dsv4_jax.llm.load", None)

    code, _, err = run(capsys, folder, ("generate", *TOKENS))

    assert code == 77
    assert_one_line(err, ("parameters take", "are free", "a mesh of more devices"))


def test_38_a_device_that_runs_out_of_memory_says_what_takes_less(capsys, folder, monkeypatch):
    def stream(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMuch more")

    monkeypatch.setattr(LLM, "stream", stream)

    code, _, err = run(capsys, folder, ("generate", *TOKENS))

    assert code == 77
    assert_one_line(err, ("the device is out of memory: RESOURCE_EXHAUSTED", "a smaller --max-batch"))


def test_39_logits_that_are_no_numbers_name_request_and_step(capsys, folder):
    value("hc_head_scale", NAN)(folder)
    (folder / "prompts.jsonl").write_bytes(b'{"id": "mine", "tokens": [5, 6]}\n')

    code, out, err = run(capsys, folder, (*FILE, "--numerics", "plain"))

    assert code == 70
    assert json.loads(out)["finish_reason"] == "error"
    assert "logits of request mine (after 0 tokens) were not finite numbers" in err


def test_a_prompt_of_ten_megabytes_is_refused_with_both_numbers(capsys, folder):
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "ab " * 3_500_000}) + "\n")

    code, out, err = run(capsys, folder, FILE)

    assert (code, out) == (2, "")
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert "tokens at least and leaves no room to answer within max_len 1024" in lines[0]


def test_control_characters_in_a_prompt_are_text(capsys, folder):
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "\x00\x1b[31m\x07\r\n\u202e"}) + "\n")

    code, out, _ = run(capsys, folder, (*FILE, "--numerics", "plain"))

    assert code == 0
    assert len(json.loads(out)["token_ids"]) == 2


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may write anywhere")
def test_37_a_read_only_folder(capsys, folder):
    prompts(GOOD)(folder)
    shut = folder / "shut"
    shut.mkdir(mode=0o555)

    code, _, err = run(capsys, folder, (*FILE, "-o", "{}/shut/out.jsonl"))

    assert code == 73
    assert_one_line(err, ("Permission denied", "writable"))
