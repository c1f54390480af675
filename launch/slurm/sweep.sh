#!/usr/bin/env bash
# Submits one run for each line of a file of overrides, as a job array:
#   bash launch/slurm/sweep.sh lines.txt --nodes=1 --array-limit=4 -- CONFIG [KEY=VALUE ...]
# A line holds what differs, its own output_dir among it, and is read as a shell reads words:
#   networks.student.optimizer.lr=1e-5 output_dir=$SCRATCH/lr_1e-5 'sampling.student_times=[1.5, 1.4, 1.0]'  # a comment
# All lines are checked before anything is submitted.
# What stands before -- is for sbatch; --array-limit=N lets N of them run at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

options=() limit=''
lines="${1:-}"
shift || true
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
    --array-limit=*) limit="%${1#*=}" ;;
    *) options+=("$1") ;;
    esac
    shift
done
if [ ! -f "$lines" ] || [ $# -lt 2 ]; then
    echo "usage: bash launch/slurm/sweep.sh FILE [SBATCH OPTION ...] -- CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
shift # --

# A copy: the file may change while the runs wait. Every line is checked first.
if [ -d "${VENV:-.venv}/bin" ]; then PATH="$(realpath "${VENV:-.venv}")/bin:$PATH"; fi
if ! python -c 'import yaml' 2>/dev/null; then
    echo "sweep.sh: got no Python with PyYAML; need one to check the lines; fix: bash launch/setup_venv.sh, or VENV=/path/to/one" >&2
    exit 2
fi
# shellcheck disable=SC1091
checked="$(. launch/environment.sh && python -m rcm_megatron.cluster.sweep "$lines" "$@")" || exit 2
mkdir -p runs/sweeps
copy="$(mktemp "runs/sweeps/$(basename "$lines").XXXXXX")"
chmod "$(printf '%o' $((0666 & ~0$(umask))))" "$copy" # mktemp's own is private to this user
printf '%s\n' "$checked" >"$copy"
count="$(wc -l <"$copy")"
# Not as --export: another one among the options would take its place.
SWEEP="$copy" sbatch --parsable --array="1-$count$limit" "${options[@]}" launch/slurm/train.sbatch "$@"
