#!/usr/bin/env python3
"""Shows what the small model knows: answers, its speed by drafts, facts found far back.

python scripts/show_small.py models/small
"""

import argparse
from pathlib import Path

from dsv4_jax.evaluation.small import DRAFTS, NEAR, Small, Timed

SHOWN = 2  # problems of each task
DISTANCES = NEAR, 1000, 4000, 8000  # tokens


def right(timed: Timed) -> list[bool]:
    answers = zip(timed.outputs, timed.problems, strict=True)
    return [(output.text or "").strip() == problem.target for output, problem in answers]


def show_answers(tasks: dict[str, Timed]) -> None:
    for task, timed in tasks.items():
        print(f"\n{task}: {sum(right(timed))} of {len(timed.problems)} right")
        shown = zip(timed.problems, timed.outputs, right(timed), strict=True)
        for problem, output, is_right in list(shown)[:SHOWN]:
            asked = problem.prompt.partition(">")[2].splitlines()[-1]
            verdict = "right" if is_right else f"wrong: {problem.target}"
            print(f"  {asked.strip()} -> {(output.text or '').strip()}   ({verdict})")


def show_speed(by_drafts: dict[int, dict[str, Timed]]) -> None:
    print("\none text at a time, tokens a second; drafts that stood by position")
    for task, without in by_drafts[0].items():
        line = f"  {task:12} without the MTP head {without.tokens_a_second:6.1f}"
        for drafts in DRAFTS:
            scores = by_drafts[drafts][task].scores()
            line += f" | {drafts} drafts {scores['tokens_a_second']:6.1f} {scores['by_position']}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=4, help="problems of each task and distance")
    arguments = parser.parse_args()
    small = Small(arguments.checkpoint, rows=arguments.rows)
    by_drafts = {0: small.alone(0)}
    show_answers(by_drafts[0])
    by_drafts |= {drafts: small.alone(drafts) for drafts in DRAFTS}
    show_speed(by_drafts)
    print("\nfacts found so many tokens back, among as many others as fit between")
    for distance, share in small.recall(DISTANCES, arguments.rows).items():
        print(f"  {distance:>5}  {share:.0%} of {arguments.rows}")


if __name__ == "__main__":
    main()
