#!/usr/bin/env bash
# Two processes on this machine's CPUs with four made-up devices each: to see how it is done, with nothing to rent.
#   scripts/launch/local_cpu.sh generate CHECKPOINT --tokens 1,2,3 --mesh tp=2,dp=4
# Everything after the script's name is a dsv4-jax command; PROCESSES, DEVICES and PORT may be set.
set -euo pipefail
processes=${PROCESSES:-2} port=${PORT:-8476}
dsv4_jax=${DSV4_JAX:-dsv4-jax}
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-4}"

children=()
for ((number = 1; number < processes; number++)); do
  $dsv4_jax "$@" --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id "$number" \
    --coordinator-timeout 60 &
  children+=($!)
done
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT
status=0
$dsv4_jax "$@" --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id 0 || status=$?
for child in "${children[@]}"; do
  wait "$child" || status=$?
done
trap - EXIT
exit "$status"
