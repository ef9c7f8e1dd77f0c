#!/usr/bin/env bash
# Builds, checks and times everything on one GPU, in under nine minutes. Rows and logs go to $OUT (default bench/results).
#   OUT=/some/dir bench/gpu_suite.sh [wheel ...]     wheels: peers to install first (liger-kernel, cut-cross-entropy, trl)
# Needs nothing from a network: torch, triton, pytest, pydantic and cmake must be there.
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
run build 120 python3 -m pip install --no-build-isolation --no-deps -e .
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv >"$out/gpu.txt" 2>&1
# Correctness first: a fast wrong kernel is worth nothing.
run test_kernels 150 python3 -m pytest -q -x tests/test_kernels.py
run test_fused 60 python3 -m pytest -q tests/test_fused.py tests/test_losses.py
bench="python3 bench/bench_linear_logprob.py --csv $out/linear_logprob.csv --dtype bfloat16"
run head_8b 100 $bench --shape 16384,4096,128256 --repeats 7
run head_small 60 $bench --shape 16384,576,49152 --repeats 15
run group_loss 60 python3 bench/bench_group_loss.py --csv "$out/group_loss.csv"
echo "== done, status $status"
exit $status
