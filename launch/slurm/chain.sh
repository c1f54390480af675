#!/usr/bin/env bash
# Submits runs that start one after the other, each when the one before has ended well (requeues included):
#   bash launch/slurm/chain.sh --nodes=4 --time=12:00:00 -- TEACHER.yaml -- STUDENT.yaml networks.teacher.init=... -- ...
# What stands before the first -- is for sbatch. When a run fails, those after it are cancelled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1") && shift; done
if [ $# -lt 2 ]; then
    echo "usage: bash launch/slurm/chain.sh [SBATCH OPTION ...] -- CONFIG [KEY=VALUE ...] [-- CONFIG [KEY=VALUE ...]] ..." >&2
    exit 2
fi
after=()
while [ $# -gt 0 ]; do
    shift # --
    run=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do run+=("$1") && shift; done
    job="$(sbatch --parsable "${options[@]}" "${after[@]}" launch/slurm/train.sbatch "${run[@]}")"
    job="${job%%;*}" # a federation adds its cluster's name
    after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    echo "$job"
done
