#!/usr/bin/env bash
# The same by Open MPI, one process a host:
#   HOSTS=host0,host1 scripts/launch/mpirun.sh generate CHECKPOINT -i prompts.jsonl -o answers.jsonl --mesh tp=16 --rules ep
# Everything after the script's name is a dsv4-jax command.
set -euo pipefail
hosts=${HOSTS:?HOSTS=host0,host1}
count=$(tr ',' '\n' <<<"$hosts" | wc -l)

exec mpirun --np "$count" --host "$hosts" --map-by ppr:1:node --bind-to none \
  -x PATH -x LD_LIBRARY_PATH -x XLA_FLAGS dsv4-jax "$@" --distributed --coordinator-timeout 120
