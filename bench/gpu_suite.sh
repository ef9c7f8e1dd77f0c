#!/usr/bin/env bash
# Builds, checks and times everything on one GPU, in under nine minutes. Rows and logs go to $OUT (default bench/results).
#   OUT=/some/dir bench/gpu_suite.sh [wheel ...]     wheels: peers to install first (liger-kernel, cut-cross-entropy, trl)
# Needs nothing from a network: torch, triton, transformers, pytest, scikit-build-core, pybind11, cmake and nvcc must be there.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
status=0
run() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n 4 "$out/$name.log"
  [ $rc -eq 0 ] || { echo "!! $name: exit $rc"; status=1; }
}
if [ $# -gt 0 ]; then run peers 60 python3 -m pip install --no-index --no-deps "$@"; fi
run build 120 python3 -m pip install --no-build-isolation --no-deps -C cmake.define.AMPO_CUDA=ON -e .
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv >"$out/gpu.txt" 2>&1
# Correctness first: a fast wrong kernel is worth nothing.
run test_kernels 100 python3 -m pytest -q -x tests/test_kernels.py
run test_ops 50 python3 -m pytest -q tests/test_fused.py tests/test_losses.py tests/test_attention_varlen.py
run test_selector 30 python3 -m pytest -q tests/test_selection_cuda.py -k "not compile"
bench="python3 bench/bench_linear_logprob.py --csv $out/linear_logprob.csv --dtype bfloat16"
run head_8b 50 $bench --shape 16384,4096,128256 --repeats 7
run head_small 25 $bench --shape 16384,576,49152 --repeats 15
run group_loss 25 python3 bench/bench_group_loss.py --csv "$out/group_loss.csv"
run selector 50 python3 bench/bench_selector_gpu.py --csv "$out/selector.csv"
run step_8b 80 python3 bench/bench_step_gpu.py --repeats 3 --csv "$out/step.csv"
echo "== done, status $status"
exit $status
