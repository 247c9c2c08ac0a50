#!/usr/bin/env bash
# Everything that a GPU shows, in one call of less than 9 minutes on 16 cores; each step without a GPU says so.
# Wants torch >= 2.11, Triton >= 3.6 and pytest in PYTHON's environment; with pytest-xdist the tests share the cores.
# Rows go to the folder OUT as they are made, and the seconds of each step to steps.csv there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
CORES=${CORES:-$(nproc)}
failed=0
mkdir -p "$OUT" build
cache=$(mktemp -d "$PWD/build/gpu-cache-XXXXXX") && trap 'rm -rf "$cache"' EXIT
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor  # one for all steps, empty at the start
export TORCHINDUCTOR_COMPILE_THREADS=1                                         # else every test process starts a pool
export TCLR_KERNELS_REQUIRE_NATIVE=1 TCLR_KERNELS_CUDA=1  # a build without some kernels fails
limits=$("$PYTHON" -m benchmarks.budget "$CORES") || exit 1
declare -A limits="($limits)"
echo "step,status,seconds,limit" > "$OUT/steps.csv"

step() { # name, command; without a limit in benchmarks/budget.py it is not run
  echo "== $1"
  local start=$SECONDS status=0
  GPU_STEP=$1 timeout -s INT -k 10 "${limits[$1]}" "${@:2}" || status=$?
  if [ $status -ne 0 ]; then echo "FAILED: $1, status $status"; failed=1; fi
  echo "$1,$status,$((SECONDS - start)),${limits[$1]}" >> "$OUT/steps.csv"
}

on_gpu() {
  if [ -n "$missing" ]; then echo "== $1: skipped, $missing"; else step "$@"; fi
}

missing=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else "no CUDA or HIP device")') || exit 1
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n "$CORES" --dist loadgroup); fi

step "build" "$PYTHON" setup.py --quiet build_ext --inplace
step "what is here" "$PYTHON" -m tclr_kernels.info
on_gpu "compile for the times and the sanitizers" "$PYTHON" -m benchmarks.gpu --compile "$CORES"
on_gpu "times" "$PYTHON" -m benchmarks.gpu --results "$OUT"
on_gpu "tests on the GPU" "$PYTHON" -m pytest -q -rs -p no:cacheprovider "${parallel[@]}" tests/gpu \
  --ignore tests/gpu/test_several_gpus.py
command -v compute-sanitizer >/dev/null || missing=${missing:-no compute-sanitizer}
for tool in memcheck racecheck initcheck synccheck; do
  on_gpu "compute-sanitizer $tool" \
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m benchmarks.gpu --sanitize
done
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "${gpus:-0}" -lt 2 ]; then missing=${missing:-it needs two GPUs}; else missing=; fi
on_gpu "tests on several GPUs" "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu/test_several_gpus.py
echo "== steps: status, seconds, limit"
cat "$OUT/steps.csv"
exit $failed
