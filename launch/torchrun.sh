#!/usr/bin/env bash
# Trains on this machine: bash launch/torchrun.sh NPROC CONFIG [KEY=VALUE ...]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash launch/torchrun.sh NPROC CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
nproc="$1"
shift

# One connection keeps Megatron's overlapped tensor-parallel communication in order on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "$nproc" -m rcm_megatron train "$@"
