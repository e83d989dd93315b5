#!/usr/bin/env python3
"""Writes the small model's tasks for `dsv4-jax eval`: problems that it was not trained on.

python scripts/train_small/make_tasks.py build/small_tasks
python scripts/train_small/make_tasks.py build/far --distances 1000 4000 8000 --rows 20
dsv4-jax eval models/small --task-dir build/small_tasks -o build/scores
"""

import argparse
import json
from pathlib import Path

from dsv4_jax.train.data import Level
from dsv4_jax.train.problems import SHORT, STOP, recall, short


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100, help="of each task")
    parser.add_argument("--items", type=int, default=Level().items, help="in a line, at most")
    parser.add_argument("--digits", type=int, default=Level().digits, help="of a number, at most")
    parser.add_argument("--distances", type=int, nargs="*", default=[100], help="of facts, in tokens")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    level, rows, seed = Level(arguments.items, arguments.digits), arguments.rows, arguments.seed
    tasks = {task: short(task, rows, level, seed) for task in SHORT}
    tasks |= {f"recall_{each}": recall(each, rows, seed) for each in arguments.distances}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, problems in tasks.items():
        lines = [{"id": id, **each._asdict(), "stop": STOP} for id, each in enumerate(problems)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (arguments.folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
