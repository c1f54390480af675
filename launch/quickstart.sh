#!/usr/bin/env bash
# Moving digits, without a GPU: data -> teacher -> distillation -> samples and numbers -> evaluation -> export.
# Arguments are configuration overrides: bash launch/quickstart.sh output_dir=/tmp/digits stages.1.steps=200
# Started again, it goes on from the run's latest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Processors that this shell may use: its affinity, or less under a container's quota.
count_cores() {
    local cores quota period
    cores="$(env -u OMP_NUM_THREADS nproc)"
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        quota=$((quota / period > 0 ? quota / period : 1))
        cores=$((quota < cores ? quota : cores))
    fi
    echo "$cores"
}

config=model_configs/quickstart.yaml
cores="$(count_cores)"
if [ "$cores" -ge 4 ]; then
    processes=4 layout=(parallel.tp=2 parallel.ring=2)
else
    processes=2 layout=(parallel.tp=1 parallel.ring=2)
fi
threads=$((cores / processes > 0 ? cores / processes : 1))
settings=("$config" "${layout[@]}" "$@")

step() { printf '\n[%s/7] %s   (%d min %02d s so far)\n' "$1" "$2" $((SECONDS / 60)) $((SECONDS % 60)); }

setting() { # the value of one key of the run, overrides applied
    python -m rcm_megatron check --world-size "$processes" --field "$1" "${settings[@]}"
}

# Rank 0 writes to the terminal, the others to files, of which the first with a traceback is shown when something fails.
on_all_processes() {
    local logs="$output/logs" quiet=0:0 rank
    for ((rank = 1; rank < processes; rank++)); do quiet+=",$rank:3"; done
    rm -rf "$logs"
    OMP_NUM_THREADS=$threads torchrun --standalone --nproc-per-node "$processes" \
        --log-dir "$logs" --redirects "$quiet" "$@" || {
        local status=$? log
        for log in $(find "$logs" -name stderr.log -printf '%T@ %p\n' | sort -n | cut -d' ' -f2-); do
            if grep -q '^Traceback\|Error' "$log"; then
                printf '\nquickstart: failed. What %s holds (rank 0 wrote above):\n' "$log" >&2
                tail -n 40 "$log" >&2
                break
            fi
        done
        exit "$status"
    }
}

step 1 "installing into .venv (nothing to do if it is up to date)"
bash launch/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
# shellcheck disable=SC1091
. launch/environment.sh
unset PYTHONDONTWRITEBYTECODE # every process would compile what it imports
export OMP_NUM_THREADS="$cores"
python -m rcm_megatron check --world-size "$processes" "${settings[@]}" >/dev/null
output="$(setting output_dir)"
data="$(setting data.folder)"
teacher="$(setting networks.teacher.init)"

step 2 "writing 8,192 captioned videos of moving digits as latent shards"
python tools/quickstart/build_dataset.py --output "$data" --num-samples 8192

step 3 "converting the teacher, a Wan2.1-architecture transformer in diffusers format"
python -m rcm_megatron convert "$teacher" "$output/teacher" --to internal --text-len "$(setting model.text_len)" --force
settings+=("networks.teacher.init=$output/teacher")

step 4 "distilling with rCM: $processes processes, ${layout[*]}, $threads thread(s) each"
on_all_processes -m rcm_megatron train "${settings[@]}"

step 5 "sampling teacher and student from the same noise, measuring, drawing the training"
on_all_processes tools/quickstart/report.py "${settings[@]}" --classifier-cache "$output/report/classifier.safetensors"
python -m rcm_megatron plot "$output" --output "$output/report/training.png"

step 6 "evaluating: quality and diversity of teacher and student, side by side (rcm evaluate)"
rm -rf "$output/evaluation" # of an earlier checkpoint, perhaps
on_all_processes -m rcm_megatron evaluate samplers "${settings[@]}" --prompts "$output/report/captions.txt" --batch-size 40 \
    --features tools.quickstart.judge:feature_network --feature-weights "$output/report/classifier.safetensors" \
    --reference "$output/report/real.safetensors" --output "$output/evaluation"

step 7 "exporting the student (EMA) to diffusers format, and comparing diffusers' network with the trained one"
python -m rcm_megatron export "${settings[@]}" --output "$output/student" --force --verify

cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Results in $output:
  report/samples.png            the picture: one caption a column, one sampler a row
  report/samples.mp4, videos/   the same, moving
  report/report.md, .json       the table above and the verdicts
  evaluation/                   precision, recall, diversity ... of each sampler: report.md, .json, figures.png, sheet.png, seeds.png
  report/training.png           losses, norms, speed and memory over the training
  student/                      the distilled network, for WanTransformer3DModel.from_pretrained
  metrics.jsonl, wandb/         every step of the training (W&B is offline unless WANDB_API_KEY is set)
  checkpoints/                  to go on from
More videos:
  .venv/bin/python -m rcm_megatron sample $output/config.yaml --steps 2 --prompt "seven moving left" --output $output/more
END
