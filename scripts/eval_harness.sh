#!/usr/bin/env bash
# The same tasks through EleutherAI's lm_eval, without network (extra: eval).
#   scripts/eval_harness.sh CHECKPOINT RUN [options of dsv4-jax eval]
set -euo pipefail
checkpoint=$(realpath "$1") run=$(realpath -m "$2")
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
.venv/bin/dsv4-jax eval "$checkpoint" --harness --tasks dsv4_arithmetic,dsv4_choice,dsv4_prose \
  --task-dir scripts/tasks/lm_eval -o "$run" "${@:3}"
