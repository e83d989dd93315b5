#!/usr/bin/env bash
# The tasks that ship, scored: arithmetic, copying, brackets, multiple choice, prose and conversations.
#   scripts/eval_small.sh CHECKPOINT RUN [options of dsv4-jax eval]
# The same command goes on with a run that was interrupted. RUN/report.html shows it all (extra: report).
set -euo pipefail
checkpoint=$(realpath "$1") run=$(realpath -m "$2")
cd "$(dirname "$0")/.."
.venv/bin/dsv4-jax eval "$checkpoint" --task-dir scripts/tasks -o "$run" "${@:3}"
