#!/usr/bin/env bash
# A number named once in a long text, to be found again: at 1k tokens the window and a few compressed entries
# hold it, at 32k the indexer has to choose it among thousands.
#   scripts/eval_needle.sh CHECKPOINT RUN [LENGTHS] [options of dsv4-jax eval]      LENGTHS: 1024,4096,16384,32768
set -euo pipefail
checkpoint=$(realpath "$1") run=$(realpath -m "$2") lengths=${3:-1024,4096,16384,32768}
cd "$(dirname "$0")/.."
.venv/bin/python scripts/make_tasks.py "$run/tasks" --needle "$lengths" >&2
.venv/bin/dsv4-jax eval "$checkpoint" --task-dir "$run/tasks" -o "$run" "${@:4}"
