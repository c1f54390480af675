#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the gpu tests, the attention benchmark, a student step of Wan2.1-1.3B's size.
# Uses the python3 in PATH (with torch for CUDA); wheels in .whl/ (megatron-core, diffusers, DALI …) are unpacked first.
# Results go to ${OUT:-runs/gpu}.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-runs/gpu}"
mkdir -p "$out"
if compgen -G ".whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH="/tmp/site:$PWD:$PWD/kernels"
else
    export PYTHONPATH="$PWD:$PWD/kernels"
fi
nvidia-smi --query-gpu=name,driver_version --format=csv | tee "$out/gpu.txt"
python3 -m pytest -q -m gpu tests/gpu tests/unit tests/interop 2>&1 | tee "$out/tests.txt" || failed=1
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -q tests/gpu/test_triton_kernels.py \
        -k "odd_shapes and 128-77-dtype0 or padded" 2>&1 | tee "$out/sanitizer.txt" || failed=1
fi
# NVLABS_RCM=<checkout of github.com/NVlabs/rcm> times its kernel in the same run
python3 -m rcm_kernels.benchmark --output "$out" ${NVLABS_RCM:+--against "$NVLABS_RCM"} 2>&1 | tee "$out/attention.txt" || failed=1
python3 tools/plot_kernel_benchmark.py "$out/attention.csv" || true
python3 tools/benchmark_fused_ops.py --measure --csv "$out/fused_ops.csv" 2>&1 | tee "$out/fused_ops.txt" || failed=1
# 31,200 tokens are 20 latent frames of 480p
for fused in auto none; do
    python3 tools/benchmark_scm_step.py --hidden 1536 --head-dim 128 --layers 30 --tokens 31200 --dtype bf16 --repeats 3 \
        --fused "$fused" --output "$out/scm_step_fused_$fused.json" || failed=1
done
exit "${failed:-0}"
