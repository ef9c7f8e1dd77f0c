#!/usr/bin/env bash
# Builds, checks and times everything on one GPU, in under nine minutes. Rows go to $OUT (default bench/results), and what
# every part printed to $OUT/gpu_suite.log.
#   OUT=/some/dir bench/gpu_suite.sh [wheel ...]     wheels to install first: peers (liger-kernel, cut-cross-entropy, trl),
#                                                    and what `ampo-fast train` needs and the machine lacks (pydantic, ...)
# On a machine that has the files without git, AMPO_FAST_COMMIT=$(git rev-parse --short=7 HEAD) names the commit for the rows.
# Needs nothing from a network: torch, triton, transformers, pytest, pytest-xdist, scikit-build-core, pybind11, cmake and
# nvcc must be there. Where the build fails the rest runs without the compiled selector.
set -u
cd "$(dirname "$0")/.." || exit
out=${OUT:-bench/results}
mkdir -p "$out"
log=$out/gpu_suite.log
export PYTHONUNBUFFERED=1
status=0
deadline=525 # of all parts: their limits add up to more, so that one may take what another left
say() { echo "== $*" | tee -a "$log"; }
run() { # name, seconds, command...
  local name=$1 limit=$2 left=$((deadline - SECONDS)) part began=$SECONDS rc
  shift 2
  if [ "$left" -lt 5 ]; then
    say "$name: left out, no time"
    status=1
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  part=$(mktemp)
  timeout -k 5 "$limit" "$@" >"$part" 2>&1
  rc=$?
  say "$name: exit $rc after $((SECONDS - began)) of $limit s"
  cat "$part" >>"$log"
  tail -n 4 "$part"
  rm "$part"
  [ $rc -eq 0 ] || status=1
  return $rc
}
versions() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
  python3 - <<'EOT'
import importlib.metadata, platform
print("python", platform.python_version())
for name in ("torch", "triton", "transformers", "scikit-build-core", "pybind11", "cmake", "pydantic"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is no Python package here")
EOT
  cmake --version | head -n 1
  nvcc --version | tail -n 2
}
{
  date
  versions
} >"$log" 2>&1
if [ $# -gt 0 ]; then run wheels 25 python3 -m pip install --no-index --no-deps "$@"; fi
built=true
if ! run build 90 python3 -m pip install --no-index --no-build-isolation --no-deps -C cmake.define.AMPO_CUDA=ON -e .; then
  say "no compiled selector: going on with the sources"
  built=false
  # What the install does for kernels/, and for this run alone.
  [ -e ampo_fast/kernels ] || { ln -s ../kernels ampo_fast/kernels && trap 'rm -f ampo_fast/kernels' EXIT; }
  export PYTHONPATH=$PWD
fi
# Correctness first: a fast wrong kernel is worth nothing. Several processes, since most of the time goes into compiling.
export OMP_NUM_THREADS=2
# These two run on cores that the kernels' tests leave free: beside them they cost no wall time.
run test_flex 90 python3 -m pytest -q -n 2 tests/test_attention_flex.py -k on_a_gpu &
beside=($!)
if $built; then
  run test_selector 60 python3 -m pytest -q tests/test_selection_cuda.py -k "not compile" &
  beside+=($!)
fi
run test_kernels 110 python3 -m pytest -q -n 8 --dist worksteal tests/test_kernels.py
for pid in "${beside[@]}"; do
  wait "$pid" || status=1 # a background part's own status ends with it
done
run test_ops 45 python3 -m pytest -q -n 8 --dist worksteal tests/test_fused.py tests/test_losses.py tests/test_attention_varlen.py
unset OMP_NUM_THREADS
head=(python3 bench/bench_linear_logprob.py --csv "$out/linear_logprob.csv" --dtype bfloat16)
run head_8b 45 "${head[@]}" --shape 16384,4096,128256 --repeats 7
run head_small 40 "${head[@]}" --shape 16384,576,49152 --repeats 15
run group_loss 55 python3 bench/bench_group_loss.py --csv "$out/group_loss.csv"
if $built; then run selector 45 python3 bench/bench_selector_gpu.py --csv "$out/selector.csv"; fi
run step_8b 80 python3 bench/bench_step_gpu.py --repeats 3 --csv "$out/step.csv"
# One whole run, in bfloat16: on a GPU other kernels and another memory take part than in the tests.
export PYTHONPATH=$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
if missing=$(python3 -c 'import jinja2, plotly, pydantic, rich, tenacity, tomli_w' 2>&1); then
  tiny=$(mktemp -d)
  run train_model 30 python3 -c '
import pathlib, sys, conftest, runs
directory = pathlib.Path(sys.argv[1])
runs.write_run(directory, conftest.make_tiny_model(directory / "model"))
' "$tiny" && run train 60 python3 -m ampo_fast.cli train "$tiny/config.toml" --run.steps 4 --model.dtype bfloat16
  rm -r "$tiny"
else
  say "train: left out, ${missing##*$'\n'}"
fi
say "done, status $status"
exit $status
