"""`dsv4-jax eval`: answers tasks and scores them."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.checkpoint.fingerprint import fingerprint
from dsv4_jax.cli.options import (
    add_command,
    add_json,
    add_model,
    add_sampling,
    answer_options,
    load_llm,
    sampling_of,
)
from dsv4_jax.cli.talk import peak_gib, say, show
from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import RequestError
from dsv4_jax.evaluation.environment import describe
from dsv4_jax.evaluation.insight import look
from dsv4_jax.evaluation.report import save_insight, write_report
from dsv4_jax.evaluation.runner import evaluate, read_timings, timing_scores, write_results
from dsv4_jax.evaluation.tasks import Task, find_tasks, read_task
from dsv4_jax.llm import LLM
from dsv4_jax.sampling import SamplingParams

_LOOKED_AT = 8  # prompts whose experts the report shows
_LOOKED_TOKENS = 512  # of each


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "eval",
        "answer tasks and score them; the same command goes on with a run that was interrupted",
        """
        dsv4-jax eval CHECKPOINT --tasks arithmetic,copy --task-dir scripts/tasks -o runs/a
        dsv4-jax eval CHECKPOINT --tasks mine.jsonl -o runs/a --max-tokens 64 --report
        dsv4-jax eval CHECKPOINT --harness --tasks dsv4_arithmetic --task-dir scripts/tasks/lm_eval -o runs/b

        what a row of a task may be: docs/evaluation.md. --harness runs tasks of EleutherAI's lm_eval.
        """,
    )
    command.add_argument(
        "--tasks", default="", metavar="A,B", help="files, or names in --task-dir (default: all)"
    )
    command.add_argument(
        "--task-dir", type=Path, metavar="DIR", help="where TASK.jsonl, or lm_eval's YAML, lie"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    command.add_argument("--context", type=int, metavar="N", help="tokens that texts to predict are read in")
    command.add_argument("--report", action="store_true", help="write report.html (needs the extra 'report')")
    command.add_argument("--harness", action="store_true", help="tasks of lm_eval (needs the extra 'eval')")
    command.add_argument("--chat", action="store_true", help="with --harness: prompts as conversations")
    add_sampling(command)
    add_json(command)
    add_model(command)
    command.set_defaults(run=run, temperature=0.0)


def run(arguments: argparse.Namespace) -> int:
    """Answers, scores, and shows the scores."""
    names = [name for name in arguments.tasks.split(",") if name]
    if arguments.limit is not None and arguments.limit < 1:
        raise RequestError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.harness:
        return _run_harness(arguments, names)
    if not names and arguments.task_dir is None:
        raise RequestError("nothing to evaluate", hint="name --tasks, or a --task-dir")
    tasks = [read_task(path, arguments.limit) for path in find_tasks(names, arguments.task_dir)]
    if len({task.name for task in tasks}) < len(tasks):
        raise RequestError(
            f"two tasks are called {', '.join(task.name for task in tasks)}: their rows would mix"
        )
    if arguments.report:
        _need_matplotlib()
    sampling = sampling_of(arguments)
    llm = load_llm(arguments)
    identity = {"model": fingerprint(arguments.checkpoint), **answer_options(arguments)}
    started = time.perf_counter()
    with count_compiles() as compiles:
        scores = evaluate(
            llm, tasks, arguments.output, identity=identity, sampling=sampling, context=arguments.context
        )
    seconds = time.perf_counter() - started
    timings = read_timings(arguments.output)
    results = {
        "command": shlex.join(["dsv4-jax", *sys.argv[1:]]),
        "identity": identity,
        "environment": describe(arguments.checkpoint, llm.model.config),
        "tasks": scores,
        "timing": timing_scores(timings),
        "seconds": seconds,
        "compile_seconds": min(compiles.seconds, seconds),
        "tokens_now": sum(
            task.get("tokens", 0) for task in scores.values() if task["new"] and task["kind"] == "match"
        ),
        "peak_gib": peak_gib(),
    }
    write_results(arguments.output, results)
    if jax.process_index() == 0:
        if arguments.report:
            save_insight(arguments.output, _looks(llm, tasks), llm.model.config.n_routed_experts)
            say(f"report: {write_report(arguments.output)}")
        if arguments.json:
            show(results)
        else:
            print("\n".join(_lines(scores)))
    return 0


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError("--report needs matplotlib", hint="pip install 'dsv4-jax[report]'") from None


def _looks(llm: LLM, tasks: list[Task]):
    prompts = [item.prompt for task in tasks for item in task.items]
    step = max(len(prompts) // _LOOKED_AT, 1)
    one = SamplingParams(max_tokens=1)
    found = []
    for prompt in prompts[::step][:_LOOKED_AT]:
        ids = llm.encode(prompt.prompt, one, prompt.where, **prompt.chat)
        found.append(look(llm, ids[:_LOOKED_TOKENS]))
    return found


def _lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of scores."""
    rows: list[tuple[str, ...]] = [("task", "measure", "items", "score", "95% interval")]
    for name, task in scores.items():
        low, high = task["interval"]
        rows.append(
            (name, task["metric"], str(task["n"]), f"{task['score']:.4f}", f"{low:.4f} to {high:.4f}")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _run_harness(arguments: argparse.Namespace, names: list[str]) -> int:
    from dsv4_jax.evaluation.harness import run_harness

    if not names:
        raise RequestError("--harness needs --tasks")
    results = run_harness(
        lambda: load_llm(arguments),
        names,
        include=arguments.task_dir,
        folder=arguments.output,
        identity={"model": fingerprint(arguments.checkpoint), **answer_options(arguments)},
        limit=arguments.limit,
        chat=arguments.chat,
    )
    if results is not None:  # None on processes other than the first
        if arguments.json:
            show(results["results"])
        else:
            print(results["table"])
    return 0
