"""Tasks of EleutherAI's lm_eval, answered by a loaded model; needs the extra `eval`.

Offline, resumable, and right on several processes: every process runs every request in the same order, the
first one keeps the answers in the run's folder, says which are there already, and alone reports.
lm_eval's own request cache is not used: it knows neither the model's settings nor that processes must agree.

`python -m dsv4_jax.evaluation.harness run --model dsv4_jax --model_args pretrained=DIR ...` is lm_eval's own
command line with this model in it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table  # pyright: ignore[reportMissingImports]
except ImportError as error:
    from dsv4_jax.errors import RequestError

    raise RequestError(
        f"tasks of lm_eval need the package ({error})", hint="pip install 'dsv4-jax[eval]'"
    ) from None

from dsv4_jax.batch import Row, answer, shared
from dsv4_jax.chat import read_messages
from dsv4_jax.chat.render import render
from dsv4_jax.chat.wire import Control
from dsv4_jax.checkpoint.fingerprint import fingerprint
from dsv4_jax.errors import EXIT_BAD_DATA, RequestError
from dsv4_jax.evaluation.likelihood import likelihoods
from dsv4_jax.evaluation.runner import make_folder, write_results
from dsv4_jax.llm import LLM
from dsv4_jax.sampling import SamplingParams

_AT_ONCE = 256  # texts that are read before their likelihoods are kept
# lm_eval hands prompts around as strings. These two characters, which no text has a use for, stand around a
# control token in them, so that the text of a document is never taken for one.
_OPEN, _CLOSE = "\ue0d5", "\ue0d6"
_CONTROL = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_GENERATION_KEYS = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
)


class HarnessLM(TemplateLM):
    """An `LLM` as lm_eval wants models."""

    def __init__(
        self,
        llm: LLM | None = None,
        folder: str | Path = "runs/lm_eval",
        identity: Mapping[str, Any] | None = None,
        *,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """Takes a loaded model; or, by `pretrained`, a folder and options of `LLM.from_pretrained`.

        Args:
          folder: where answers are kept.
          identity: what they depend on.
        """
        super().__init__()
        if llm is None:
            if pretrained is None:
                raise RequestError("lm_eval: --model_args must have pretrained=FOLDER")
            if isinstance(batch_size, int) or (batch_size or "").isdecimal():
                options.setdefault("max_batch", int(batch_size))  # type: ignore[arg-type]
            llm = LLM.from_pretrained(pretrained, **options)
            identity = {
                "model": fingerprint(pretrained),
                **{key: str(value) for key, value in options.items()},
            }
        if llm.tokenizer is None:
            raise RequestError("tasks of lm_eval are text, and the checkpoint has no tokenizer.json")
        self._llm, self._tokenizer = llm, llm.tokenizer
        self._folder, self._identity = Path(folder), dict(identity or {})
        make_folder(self._folder)

    # --- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self._llm.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._llm.model.config.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._identity.get("model", "dsv4_jax"))

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "DeepSeek-V4" if chat_template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; only what `apply_chat_template` marked becomes control tokens."""
        ids = []
        for place, part in enumerate(_CONTROL.split(string)):
            if place % 2:
                ids.append(self._tokenizer.control_id(part))
            elif part:
                ids += self._tokenizer.encode_plain(part)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one string, its control tokens marked."""
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt and messages[-1]["role"] == "assistant":
            messages[-1]["prefix"] = True  # type: ignore[assignment]
        pieces = render(read_messages(messages), thinking=False)
        return "".join(f"{_OPEN}{piece}{_CLOSE}" if isinstance(piece, Control) else piece for piece in pieces)

    # --- requests

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [([*context, *continuation], len(context)) for _, context, continuation in requests]

        def read(places: Sequence[int]) -> Iterator[tuple[int, Row]]:
            for first in range(0, len(places), _AT_ONCE):
                some = places[first : first + _AT_ONCE]
                found = dict(likelihoods(self._llm, [texts[place] for place in some]))
                for number, place in enumerate(some):
                    logprob, greedy = math.fsum(found[number].logprobs), all(found[number].greedy)
                    yield place, {"logprob": logprob, "greedy": greedy}

        rows = self._kept("loglikelihood", [[ids, start] for ids, start in texts], read)
        return [(row["logprob"], row["greedy"]) for row in rows]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_len` tokens that do not overlap but for one token."""
        asked, windows_of = [], []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._llm.max_len - 1,
                context_len=1,
            )
            pieces = [(("", ""), *make_disjoint_window(window)) for window in windows]
            windows_of.append(range(len(asked), len(asked) + len(pieces)))
            asked += pieces
        found = self._loglikelihood_tokens(asked)
        return [math.fsum(found[place][0] for place in places) for places in windows_of]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string of the task."""
        asked = []
        for context, arguments in (request.args for request in requests):
            sampling = _sampling(arguments)
            asked.append((self._llm.encode(self.tok_encode(context), sampling, "a request"), sampling))

        def read(places: Sequence[int]) -> Iterator[tuple[int, Row]]:
            skip = [True] * len(asked)
            for place in places:
                skip[place] = False
            for place, output in answer(self._llm, asked, skip):
                yield place, {"text": output.text, "finish_reason": output.finish_reason}

        keys = [[request.args[0], request.args[1]] for request in requests]
        return [row["text"] for row in self._kept("generate_until", keys, read)]

    def _kept(
        self, kind: str, asked: Sequence[Any], read: Callable[[Sequence[int]], Iterator[tuple[int, Row]]]
    ) -> list[Row]:
        """A row for each request: what the folder has, and the others as `read` gives them, in order."""
        keys, seen = [], {}
        for request in asked:
            sha = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
            seen[sha] = seen.get(sha, 0) + 1
            keys.append({"id": f"{sha}.{seen[sha]}", "prompt_sha": sha})
        identity = {**self._identity, "requests": kind, "max_len": self._llm.max_len}
        with shared(self._folder / f"{kind}.jsonl", identity, keys) as (file, known):
            missing = [place for place, row in enumerate(known) if row is None]
            for number, (place, found) in enumerate(read(missing)):
                known[place] = keys[place] | found
                if file is not None:
                    file.append(keys[place] | found, left=len(missing) - number)
        return [row for row in known if row is not None]


register_model("dsv4_jax")(HarnessLM)


def _sampling(arguments: Mapping[str, Any]) -> SamplingParams:
    """What a task asks of generation; greedy unless it says otherwise."""
    if unknown := [key for key in arguments if key not in _GENERATION_KEYS]:
        raise RequestError(
            f"a task's generation_kwargs have {unknown[0]!r}, known are {', '.join(_GENERATION_KEYS)}"
        )
    until = arguments.get("until") or []
    most = next((arguments[key] for key in _GENERATION_KEYS[1:4] if arguments.get(key) is not None), 256)
    temperature = float(arguments.get("temperature") or 0.0)
    if arguments.get("do_sample") and not temperature:
        temperature = 1.0
    return SamplingParams(
        max_tokens=int(most),
        temperature=temperature if arguments.get("do_sample", temperature > 0) else 0.0,
        top_p=float(arguments.get("top_p", 1.0)),
        top_k=max(int(arguments.get("top_k", 0)), 0),
        stop=tuple([until] if isinstance(until, str) else until),
    )


def run_harness(
    load: Callable[[], LLM],
    tasks: Sequence[str],
    *,
    include: Path | None,
    folder: Path,
    identity: Mapping[str, Any],
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any] | None:
    """Runs tasks of lm_eval and gives its results with a "table"; None on processes other than the first.

    Args:
      load: is called once the tasks are known to be there.
      include: a folder of tasks; by default those that come with lm_eval.
      folder: where answers and results.json go; the same call goes on with it.
      chat: make a conversation of each prompt.

    Raises:
      RequestError: there is no such task, or its files are not what they should be.
    """
    # lm_eval takes this for the number of a process that shares one model, and lets only 0 report.
    os.environ["LOCAL_RANK"] = str(jax.process_index())
    manager: Any = TaskManager(
        include_path=str(include) if include else None, include_defaults=include is None
    )
    known = manager.match_tasks(list(tasks))
    if missing := [name for name in tasks if name not in known]:
        there = ", ".join(manager.all_tasks[:20])
        raise RequestError(
            f"lm_eval has no task {missing[0]!r}", hint=f"there are {there}", exit_code=EXIT_BAD_DATA
        )
    model = HarnessLM(load(), folder, identity)
    try:
        results: Any = simple_evaluate(  # type: ignore[call-arg]
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except FileNotFoundError as error:
        raise RequestError(f"a task's data is not there: {error}", exit_code=EXIT_BAD_DATA) from error
    if results is None:
        return None
    kept = {key: results[key] for key in ("results", "versions", "n-samples", "higher_is_better")}
    write_results(folder, {"identity": dict(identity), **json.loads(json.dumps(kept, default=str))})
    return {"results": kept["results"], "table": make_table(results)}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
