#!/usr/bin/env python3
"""Shows what the small model knows: answers, its speed with drafts and without, facts found far back.

python scripts/show_small.py models/small
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv4_jax.evaluation.small import NEAR, Small, Timed, ask, share, timed
from dsv4_jax.train.problems import recall

SHOWN = 2  # problems of each task
DRAFTS = 3
DISTANCES = NEAR, 1000, 4000, 8000  # tokens
ROOM = max(DISTANCES) + 256
SEED = 1


def show_answers(task: str, plain: Timed) -> None:
    right = share(plain.outputs, plain.problems)
    print(f"\n{task}: {right:.0%} of {len(plain.problems)} right")
    for problem, output in list(zip(plain.problems, plain.outputs, strict=True))[:SHOWN]:
        *_, asked = problem.prompt.partition(">")[2].splitlines()
        print(f"  {asked.strip()} -> {(output.text or '').strip()}   (right: {problem.target})")


def show_speed(task: str, plain: Timed, drafted: Timed) -> None:
    scores, factor = drafted.scores(), drafted.tokens_a_second / plain.tokens_a_second
    print(
        f"  {task:12}{plain.tokens_a_second:6.1f} without, {drafted.tokens_a_second:6.1f} by {DRAFTS} drafts"
        f" ({factor:.1f}x); {scores['tokens_a_step']:.2f} tokens a step, drafts that stood, by position:"
        f" {scores['by_position']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=4, help="problems of each task and distance")
    arguments = parser.parse_args()
    small = Small(arguments.checkpoint, rows=arguments.rows)
    tasks = small.problems()
    llms = [small.serve(max_len=ROOM, max_batch=1, draft_tokens=drafts) for drafts in (0, DRAFTS)]
    print("compiling", file=sys.stderr)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda llm: ask(llm, [problems[0] for problems in tasks.values()]), llms))
    plain, drafted = ({task: timed(llm, each) for task, each in tasks.items()} for llm in llms)
    for task in tasks:
        show_answers(task, plain[task])
    print("\ntokens a second, one text at a time")
    for task in tasks:
        show_speed(task, plain[task], drafted[task])
    print("\nfacts found so many tokens back")
    for distance in DISTANCES:
        problems = list(recall(distance, arguments.rows, SEED))
        print(
            f"  {distance:>5}  {share(ask(llms[0], problems), problems):.0%} of {len(problems)}", flush=True
        )


if __name__ == "__main__":
    main()
