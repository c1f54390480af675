#!/usr/bin/env bash
# Submits one run for each line of a file of overrides, as a job array:
#   bash launch/slurm/sweep.sh lines.txt --nodes=1 --array-limit=4 -- CONFIG [KEY=VALUE ...]
# A line holds what differs, its own output_dir among it:  student_optimizer.lr=1e-5 output_dir=runs/lr_1e-5
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

# A copy without comments: the file may change while the runs wait.
mkdir -p runs/sweeps
copy="$(mktemp "runs/sweeps/$(basename "$lines").XXXXXX")"
grep -v '^[[:space:]]*\(#\|$\)' "$lines" >"$copy" || true
count="$(wc -l <"$copy")"
folders="$(grep -o '\(^\|[[:space:]]\)output_dir=[^[:space:]]*' "$copy" | sort -u | wc -l || true)"
if [ "$count" -eq 0 ] || [ "$folders" -ne "$count" ]; then
    echo "sweep.sh: got $count lines with $folders different output_dir=... in $lines; need one for each line" >&2
    rm "$copy"
    exit 2
fi
# Not as --export: another one among the options would take its place.
SWEEP="$copy" sbatch --parsable --array="1-$count$limit" "${options[@]}" launch/slurm/train.sbatch "$@"
