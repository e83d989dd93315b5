#!/usr/bin/env python3
"""Scores the small model into its scores.json, part by part, and writes its card from them.

python scripts/train_small/evaluate.py models/small --run build/run       everything
python scripts/train_small/evaluate.py models/small --parts drafts        one part, measured anew

A run that was killed goes on with the parts that it lacks. No part but `drafts`, which takes the time, needs
a GPU; `loss` needs the run, for the weights before they were quantised.
"""

import argparse
import datetime
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.config import Config
from dsv4_jax.evaluation.small import DRAFTS, NEAR, Small
from dsv4_jax.train.data import Level
from dsv4_jax.train.run import CURVE, restored

Scores = dict[str, Any]


def parts(small: Small, scores: Scores, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is scored, by name."""
    distances, rows = arguments.distances, arguments.far_rows

    def loss() -> dict[str, float]:
        masters = restored(arguments.run, small.model.config).masters
        float32, quantised = small.loss_unquantised(masters), small.loss()["loss"]
        return {"float32": float32, "quantised": quantised, "ratio": quantised / float32}

    return {
        "exact": small.exact,
        "recall": lambda: small.recall(distances, rows),
        "recall_by_random_choice": lambda: small.recall_by_random_choice(distances, rows),
        # how fast a machine is does not say how fast another one is
        "drafts": lambda: scores.get("drafts", {}) | {jax.devices()[0].device_kind: small.drafts()},
        **({"loss": loss} if arguments.run else {}),
        "faults": lambda: {"none": small.exact() | small.loss()} | small.with_faults(),
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    """In Markdown."""
    cells = [[f"{each:.3g}" if isinstance(each, float) else str(each) for each in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def card(scores: Mapping[str, Any], curve: list[dict[str, Any]], config: Config, nbytes: int) -> str:
    """README.md of the model."""
    level, exact, far, measured = (scores[name] for name in ("level", "exact", "recall", "measured"))
    random, drafts, loss = (scores.get(name, {}) for name in ("recall_by_random_choice", "drafts", "loss"))
    losses = [*scores["faults"].values(), {}][0]
    text = [
        "# A small DeepSeek-V4",
        f"The real architecture in {nbytes / 1e6:.1f} MB: {config.num_hidden_layers} layers and an MTP head,"
        f" FP4 experts and FP8 linears, trained by `scripts/train_small/train.py`, seed {scores['seed']}, in"
        f" {curve[-1]['step']} steps and {curve[-1]['seconds']:.0f} s. What it was trained on, and how:"
        " docs/training.md. It knows these tasks and nothing else:",
        "```\n720+583=2140        27 + 385 = 412, the units first\ncopy lamp egg owl = lamp egg owl\n"
        "sort 8 3 5 = 3 5 8\nclose ( [ { = } ] )\n red lamp owl        what follows a pair of words is the"
        " same wherever it comes again\n```",
        "All scores are of the quantised model in the released arithmetic, on problems that it never saw,"
        f" with up to {level['items']} items and {level['digits']} digits"
        f" ({measured['exact']['rows']} of each task, {measured['recall']['far_rows']} of each distance)."
        " scores.json has them all.",
        "## Right answers",
        table(list(exact), [list(exact.values())]),
        "## Facts found",
        table(
            ["tokens away", *far],
            [["with the indexer", *far.values()], ["entries drawn at random", *random.values()]],
        ),
    ]
    for device, by_count in drafts.items():
        rows = [
            [task, without["tokens_a_second"]]
            + [by_count[str(k)][task][name] for k in DRAFTS for name in ("tokens_a_step", "speed_up")]
            for task, without in by_count["0"].items()
        ]
        unlike = [each for tasks in by_count.values() for each in tasks.values() if not each["same_tokens"]]
        head = [f"{name}, {k} drafts" for k in DRAFTS for name in ("tokens a step", "speed-up")]
        text += [
            f"## Drafts of the MTP head, {device}",
            f"One text at a time, {measured['drafts'][device]['rows']} of each task; speeds are of one run,"
            " and answers are short (docs/training.md). With `invariant` the tokens are"
            f" {'NOT ' * bool(unlike)}those without drafts.",
            table(["task", "tokens/s without", *head], rows),
        ]
    if loss:
        text += [
            "## Quantised against float32",
            f"{loss['quantised']:.4f} nats a token against {loss['float32']:.4f}:"
            f" {100 * (loss['ratio'] - 1):+.2f}%.",
        ]
    if losses:
        rows = [[fault, *each.values()] for fault, each in scores["faults"].items()]
        text += ["## Faults planted in the model", table(["fault", *losses], rows)]
    every = max(len(curve) // 12, 1)
    text += [
        "## Loss while training",
        table(
            ["step", *curve[-1]["answers"], "other tokens", "MTP"],
            [
                [row["step"], *row["answers"].values(), row["others"], row["mtp"]]
                for row in curve[::-every][::-1]
            ],
        ),
    ]
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--run", type=Path, help="the folder of the training run")
    parser.add_argument("--parts", nargs="*", default=[], help="to be measured anew (default: those missing)")
    parser.add_argument("--rows", type=int, default=200, help="of each task")
    parser.add_argument("--far-rows", type=int, default=40, help="of each distance")
    parser.add_argument("--distances", type=int, nargs="*", default=[NEAR, 1000, 4000, 8000])
    parser.add_argument("--items", type=int, default=Level().items, help="in a line, at most")
    parser.add_argument("--digits", type=int, default=Level().digits, help="of a number, at most")
    arguments = parser.parse_args()
    small = Small(arguments.checkpoint, rows=arguments.rows, level=Level(arguments.items, arguments.digits))
    path = arguments.checkpoint / "scores.json"
    scores: Scores = json.loads(path.read_text()) if path.exists() else {"measured": {}}
    scores["level"] = small.level._asdict()
    there = parts(small, scores, arguments)
    for name in arguments.parts or [name for name in there if name not in scores]:
        started, device = time.monotonic(), jax.devices()[0].device_kind
        scores[name] = there[name]()
        measured = {
            "device": device,
            "rows": arguments.rows,
            "far_rows": arguments.far_rows,
            "date": f"{datetime.date.today()}",
            "commit": os.environ.get("DSV4_COMMIT") or subprocess.getoutput("git rev-parse --short HEAD"),
            "seconds": round(time.monotonic() - started),
        }
        # Like the scores: one device does not speak for another.
        before = scores["measured"].get(name, {})
        scores["measured"][name] = before | {device: measured} if name == "drafts" else measured
        path.write_text(json.dumps(scores, indent=1) + "\n")
        print(json.dumps({name: scores[name]}), f"{measured['seconds']} s", flush=True)
    if arguments.run:
        scores["seed"] = json.loads((arguments.run / "plan.json").read_text()).get("seed", 0)
        curve = [json.loads(line) for line in (arguments.run / CURVE).read_text().splitlines()]
        nbytes = sum(each.stat().st_size for each in arguments.checkpoint.glob("*.safetensors"))
        (arguments.checkpoint / "README.md").write_text(card(scores, curve, small.model.config, nbytes))
        path.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
