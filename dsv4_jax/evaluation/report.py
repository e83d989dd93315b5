"""One HTML file of a run, for people: scores with intervals, speed, what was wrong. No script, no network.

Everything comes from the run's folder. Charts need matplotlib, which the extra `report` brings.
"""

import html
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.errors import EXIT_NO_INPUT, OutputError, RequestError
from dsv4_jax.evaluation.charts import acceptance_chart, index_chart, load_chart, score_chart
from dsv4_jax.evaluation.insight import Insight, expert_load
from dsv4_jax.evaluation.runner import read_timings

_LISTED = 12  # rows of a table of examples
_SHOWN = 160  # characters of a text in it

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 }
h2 { font-size: 1.15rem; margin-top: 2.2rem; color: #1f3a5f }
table { border-collapse: collapse; width: 100% } th { text-align: left; color: #555; font-weight: 600 }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e8ee; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f4f6f8; border-radius: 4px }
code { padding: .1rem .3rem } pre { padding: .7rem; overflow-x: auto; white-space: pre-wrap }
p.note { color: #555 } img { max-width: 100% }
td.text { font: 13px/1.45 ui-monospace, monospace; word-break: break-word }
"""


def save_insight(folder: str | Path, insights: Sequence[Insight], experts: int) -> None:
    """Keeps what `look` found for some texts, for the report's pictures of experts and indexer."""
    longest = max(insights, key=lambda each: each.experts.shape[1])
    arrays = {f"entries_{layer}": chosen for layer, chosen in longest.entries.items()}
    arrays["load"] = np.sum([expert_load(each, experts) for each in insights], axis=0)
    np.savez_compressed(Path(folder) / "insight.npz", allow_pickle=False, **arrays)


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` beside the run's `results.json`, and gives its path.

    Raises:
      RequestError: the folder holds no finished run (66), or matplotlib is not there (2).
      OutputError: it cannot be written.
    """
    folder = Path(folder)
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{folder} holds no results.json of a finished run: {error}", exit_code=EXIT_NO_INPUT
        ) from None
    text = _page(folder, results)
    path = folder / "report.html"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _page(folder: Path, results: Mapping[str, Any]) -> str:
    tasks: Mapping[str, Any] = results["tasks"]
    timings = read_timings(folder)
    identity, environment = results["identity"], results["environment"]
    name = Path(str(environment["checkpoint"])).name
    made = (
        environment["finished"],
        f"model {identity['model']}",
        f"config {environment['config']}",
        f"dsv4_jax {environment['dsv4_jax']}",
        environment["device"],
    )
    scores = ("task", "measure", "items", "score", "95% interval", "beside it")
    settings = [(key, json.dumps(value)) for key, value in {**identity, **environment}.items()]
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p class=note>{html.escape(' · '.join(made))}</p>",
        "<h2>Scores</h2>",
        _table(scores, map(_score_row, tasks.items()), {2, 3}),
        score_chart(tasks),
        *_speed(results, timings, tasks),
        *_insight(folder / "insight.npz"),
        *_examples(folder, tasks, timings),
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(results['command'])}</pre>",
        _table(("setting", "value"), settings),
    ]
    body = "\n".join(part for part in parts if part)
    title = html.escape(f"{name}: {', '.join(tasks)}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# --- tables


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Collection[int] = (),
    texts: Collection[int] = (),
) -> str:
    """A table; every cell is escaped here."""

    def cell(tag: str, place: int, value: str) -> str:
        kind = (
            " class=number" if place in numbers else " class=text" if place in texts and tag == "td" else ""
        )
        return f"<{tag}{kind}>{html.escape(str(value))}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", place, name) for place, name in enumerate(head)) + "</tr>"]
    lines += [
        "<tr>" + "".join(cell("td", place, value) for place, value in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"


def _score_row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, task = item
    low, high = task["interval"]
    beside = []
    if "stderr" in task:
        beside.append(f"± {task['stderr']:.4f}")
    if "chance" in task:
        beside.append(
            f"chance {task['chance']:.2f}, picks {task['picks']}, by byte {task['accuracy_by_byte']:.3f}"
        )
    if "perplexity_per_token" in task:
        beside.append(
            f"perplexity {task['perplexity_per_token']:.2f} a token, {task['perplexity_per_byte']:.3f} a byte"
        )
    if "finish_reasons" in task:
        beside.append(", ".join(f"{count} {reason}" for reason, count in task["finish_reasons"].items()))
    measure = str(task["metric"]).replace("_", " ")
    return (
        name,
        measure,
        str(task["n"]),
        f"{task['score']:.4f}",
        f"{low:.4f} to {high:.4f}",
        " · ".join(beside),
    )


def _examples(folder: Path, tasks: Mapping[str, Any], timings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that are worth a look: the slowest, and the wrong ones of each task."""
    parts = []
    if timings:
        slowest = sorted(timings, key=lambda row: -row["seconds"])[:_LISTED]
        rows = [
            (
                row["task"],
                row["id"],
                str(row["tokens"]),
                f"{row['first_token_seconds']:.3f}",
                f"{row['seconds']:.3f}",
            )
            for row in slowest
        ]
        parts += [
            "<h2>Slowest answers</h2>",
            _table(("task", "id", "tokens", "first token, s", "all, s"), rows, {2, 3, 4}),
        ]
    for name, task in tasks.items():
        wrong = task.get("wrong", [])
        if not wrong or task["kind"] != "match":
            continue
        rows_of = {}
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows_of[row["id"]] = row
        shown = [rows_of[id] for id in wrong[:_LISTED] if id in rows_of]
        rows = [(row["id"], row["finish_reason"], _brief(row["text"] or "")) for row in shown]
        parts += [
            f"<h2>{html.escape(name)}: {len(wrong)} of {task['n']} not right</h2>",
            _table(("id", "ended by", "answer"), rows, texts={2}),
        ]
    return parts


def _brief(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def _speed(
    results: Mapping[str, Any], timings: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]
) -> list[str]:
    timing = results.get("timing") or {}
    if not timing:
        return []
    first, rate = timing["first_token_seconds"], timing["tokens_per_second_of_a_request"]
    rows = [("first token, seconds", *(f"{first[key]:.3f}" for key in ("p50", "p99", "max")))]
    if rate:
        rows.append(("tokens a second, one request", *(f"{rate[key]:.1f}" for key in ("p50", "p99", "max"))))
    total = f"{timing['tokens']:,} tokens generated"
    if results.get("seconds"):
        running = results["seconds"] - results.get("compile_seconds", 0.0)
        total += (
            f", {results['tokens_now'] / max(running, 1e-9):.1f} a second over the whole run,"
            f" which took {running:.1f} s and {results.get('compile_seconds', 0.0):.1f} s more of compiling"
        )
    parts = [
        "<h2>Speed</h2>",
        f"<p>{html.escape(total)}; peak memory {results.get('peak_gib', 0.0):.2f} GiB.</p>",
        _table(("", "median", "99%", "largest"), rows, {1, 2, 3}),
    ]
    accepted = {name: task["acceptance"] for name, task in tasks.items() if "acceptance" in task}
    if accepted:
        parts += ["<h2>Drafts that stood</h2>", acceptance_chart(accepted)]
        lengths = ", ".join(f"{name} {each['mean_length']:.2f}" for name, each in accepted.items())
        parts.append(f"<p class=note>Mean tokens a step, 1 without drafts: {html.escape(lengths)}.</p>")
    return parts


def _insight(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        load = arrays["load"]
        maps = {int(name.partition("_")[2]): arrays[name] for name in arrays.files if name != "load"}
    parts = ["<h2>Load of the experts</h2>", load_chart(load)]
    uneven = load.max(1) / load.mean(1)
    layers = ", ".join(f"{value:.1f}" for value in uneven)
    parts.append(f"<p class=note>Busiest expert over the mean, by layer: {layers}.</p>")
    if maps:
        parts += [
            "<h2>What the indexer chose</h2>",
            index_chart(maps),
            "<p class=note>Each column is a token of the longest text looked at; dark are the compressed"
            " entries that it attended to. Below the diagonal lie those that are still to come.</p>",
        ]
    return parts
