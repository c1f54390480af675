#!/usr/bin/env bash
# Everything that needs one GPU, in one command: bash tests/gpu/run.sh. Results go to ${OUT:-runs/gpu}.
# Parts by name, where a command may take ten minutes only:  bash tests/gpu/run.sh tests kernels
#
#   tests      the Triton kernels, and the other backends of plain attention, against fp64, in bf16, fp16 and fp32
#   sanitizer  compute-sanitizer's memcheck on a small case of them
#   kernels    attention at the sizes of training beside torch's flash attention, CSV and plot; the fused operations
#   against    the attention of NVlabs/rcm in the same run, if NVLABS_RCM=<your checkout>; it tunes itself for minutes at each length
#   trace      what share of a ring's hops hides behind compute, a device copy standing in for a message
#   step       an sCM step of Wan2.1-1.3B at 480p: time, MFU, memory, with and without each fused operation
#   rcm        rCM's student step (sCM and DMD) of the same
#   program    the rest of the gpu tests: conformance, training and resume, memory policies, Transformer Engine, encoders, loader
#
# Uses the python3 in PATH, with torch for CUDA. Wheels in .whl/ are unpacked first; docs/gpu.md says which parts need which, how to make
# them, and which parts fit together into ten minutes.
# A part that fails does not stop the others; the exit status is 1 then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
out="${OUT:-runs/gpu}"
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(tests sanitizer kernels against trace step rcm program)
failed=0

# run NAME COMMAND...: what it prints goes to $out/NAME.txt too
run() {
    local name="$1"
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt" || { failed=1; echo "== $name failed"; }
}

# The kernels' tests are mostly compiling: on all cores where pytest-xdist is there.
kernel_tests() {
    local parallel=()
    python3 -c "import xdist" 2>/dev/null && parallel=(-n 8)
    run tests python3 -m pytest -q -m gpu "${parallel[@]}" tests/gpu/test_triton_kernels.py \
        tests/gpu/test_attention_backends.py tests/gpu/test_fused_cuda.py
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed: not run" | tee "$out/sanitizer.txt"
        return
    fi
    run sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -q -m gpu tests/gpu/test_triton_kernels.py \
        -k "odd_shapes and 128-77-dtype0 or padded and 64"
}

kernels() {
    run attention python3 -m rcm_kernels.benchmark --output "$out"
    run plot python3 tools/plot_kernel_benchmark.py "$out/attention.csv"
    run fused_ops python3 tools/benchmark_fused_ops.py --measure --csv "$out/fused_ops.csv"
}

against() {
    if [[ -z "${NVLABS_RCM:-}" ]]; then
        echo "NVLABS_RCM names no checkout of github.com/NVlabs/rcm: its kernel is not timed" | tee "$out/against.txt"
        return
    fi
    mkdir -p "$out/against"
    run against python3 -m rcm_kernels.benchmark --cases self_1.3b_480p ring_14b_480p_cp4 --against "$NVLABS_RCM" --output "$out/against"
}

part() {
    case "$1" in
    tests) kernel_tests ;;
    sanitizer) sanitizer ;;
    kernels) kernels ;;
    against) against ;;
    trace) run overlap python3 tools/trace_ring_overlap.py --output "$out" ;;
    step) run step python3 tools/benchmark_student_step.py --step scm --output "$out/step.json" ;;
    rcm) run rcm python3 tools/benchmark_student_step.py --step student --settings none all --output "$out/rcm.json" ;;
    program)
        run program python3 -m pytest -q -m gpu tests/gpu tests/unit/test_data_loader.py tests/interop/test_wan_encoders.py \
            --ignore tests/gpu/test_triton_kernels.py --ignore tests/gpu/test_attention_backends.py --ignore tests/gpu/test_fused_cuda.py
        ;;
    *)
        echo "got part '$1'; need one of tests, sanitizer, kernels, against, trace, step, rcm, program" >&2
        return 2
        ;;
    esac
}

for name in "${parts[@]}"; do # before minutes are spent on the parts before it
    [[ " tests sanitizer kernels against trace step rcm program " == *" $name "* ]] || { part "$name"; exit 2; }
done
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1
if compgen -G ".whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
    export PYTHONPATH="/tmp/site:$PYTHONPATH"
fi
nvidia-smi --query-gpu=name,driver_version --format=csv | tee "$out/gpu.txt" || { echo "got no GPU; need one: this runs what a CPU cannot" >&2; exit 2; }
for name in "${parts[@]}"; do
    part "$name"
done
exit "$failed"
