#!/usr/bin/env bash
# Moving digits, without a GPU: data -> teacher -> distillation -> samples and numbers -> export. Results in runs/quickstart.
# Arguments are configuration overrides: bash launch/quickstart.sh stages.1.steps=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

config=model_configs/quickstart.yaml
if [ "$(nproc)" -ge 4 ]; then
    processes=4 layout=(parallel.tp=2 parallel.ring=2)
else
    processes=2 layout=(parallel.tp=1 parallel.ring=2)
fi
settings=("$config" "${layout[@]}" "$@")
step() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }

python -m rcm_megatron check --world-size "$processes" "${settings[@]}" >/dev/null
step "writing 8,192 captioned videos of moving digits as latent shards"
python tools/build_digits_dataset.py --output runs/quickstart/data --num-samples 8192
step "distilling on $processes processes (${layout[*]})"
bash launch/torchrun.sh "$processes" "${settings[@]}"
