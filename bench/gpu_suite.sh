#!/usr/bin/env bash
# Builds, checks and times everything on one GPU, in under nine minutes. Rows go to $OUT (default bench/results), and what
# every part printed to $OUT/gpu_suite.log.
#   OUT=/some/dir bench/gpu_suite.sh [wheel ...]     wheels: peers to install first (liger-kernel, cut-cross-entropy, trl)
# Needs nothing from a network: torch, triton, transformers, pytest, pytest-xdist, scikit-build-core, pybind11, cmake and
# nvcc must be there.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
log=$out/gpu_suite.log
export PYTHONUNBUFFERED=1
status=0
run() { # name, seconds, command...
  local name=$1 limit=$2 part began=$SECONDS
  shift 2
  part=$(mktemp)
  timeout "$limit" "$@" >"$part" 2>&1
  local rc=$?
  echo "== $name: exit $rc after $((SECONDS - began)) of $limit s" | tee -a "$log"
  cat "$part" >>"$log"
  tail -n 4 "$part"
  rm "$part"
  [ $rc -eq 0 ] || status=1
  return $rc
}
date >"$log"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv >>"$log" 2>&1
if [ $# -gt 0 ]; then run peers 25 python3 -m pip install --no-index --no-deps "$@"; fi
run build 90 python3 -m pip install --no-build-isolation --no-deps -C cmake.define.AMPO_CUDA=ON -e .
# Correctness first: a fast wrong kernel is worth nothing. Several processes, since most of the time goes into compiling.
export OMP_NUM_THREADS=2
# FlexAttention's two programs compile cold, on cores that the kernels' tests leave free: beside them they cost no wall time.
run test_flex 90 python3 -m pytest -q -n 2 tests/test_attention_flex.py &
test_flex=$!
run test_kernels 110 python3 -m pytest -q -n 8 --dist worksteal tests/test_kernels.py
wait "$test_flex" || status=1 # a background part's own status ends with it
run test_ops 45 python3 -m pytest -q -n 8 --dist worksteal tests/test_fused.py tests/test_losses.py tests/test_attention_varlen.py
run test_selector 30 python3 -m pytest -q tests/test_selection_cuda.py -k "not compile"
unset OMP_NUM_THREADS
bench="python3 bench/bench_linear_logprob.py --csv $out/linear_logprob.csv --dtype bfloat16"
run head_8b 45 $bench --shape 16384,4096,128256 --repeats 7
run head_small 20 $bench --shape 16384,576,49152 --repeats 15
run group_loss 35 python3 bench/bench_group_loss.py --csv "$out/group_loss.csv"
run selector 45 python3 bench/bench_selector_gpu.py --csv "$out/selector.csv"
run step_8b 80 python3 bench/bench_step_gpu.py --repeats 3 --csv "$out/step.csv"
echo "== done, status $status"
exit $status
