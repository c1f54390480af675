#!/usr/bin/env bash
# Trains on this machine: bash launch/torchrun.sh NPROC CONFIG [KEY=VALUE ...]
# Failed processes (a crash, a hang) are started again up to MAX_RESTARTS (3) times, from the newest checkpoint. SIGTERM or SIGUSR1
# to this process: a checkpoint is written, and it ends. Start the same command to go on.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash launch/torchrun.sh NPROC CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
nproc="$1"
shift

# shellcheck disable=SC1091
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# One connection keeps Megatron's overlapped tensor-parallel communication in order on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Seconds that a step and the checkpoint after it may take once a signal has come.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --standalone --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m rcm_megatron train "$@"
