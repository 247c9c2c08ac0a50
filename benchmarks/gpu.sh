#!/usr/bin/env bash
# Everything that a GPU shows, in one call of less than 9 minutes; each step without a GPU says so.
# Wants torch >= 2.11, Triton >= 3.6 and pytest in PYTHON's environment. Results go to OUT; the table comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
failed=0

step() { # name, seconds, command
  echo "== $1"
  timeout "$2" "${@:3}" || { echo "FAILED: $1, status $?"; failed=1; }
}

on_gpu() {
  if [ -n "$missing" ]; then echo "== $1: skipped, $missing"; else step "$@"; fi
}

missing=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else "no CUDA or HIP device")') || exit 1
step "build" 110 "$PYTHON" setup.py --quiet build_ext --inplace
step "what is here" 30 "$PYTHON" -m tclr_kernels.info
on_gpu "tests on the GPU" 190 "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu
on_gpu "small problems, compiled for the sanitizers" 30 "$PYTHON" -m benchmarks.gpu --sanitize
command -v compute-sanitizer >/dev/null || missing=${missing:-no compute-sanitizer}
for tool in memcheck racecheck initcheck synccheck; do
  on_gpu "compute-sanitizer $tool" 22 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m benchmarks.gpu --sanitize
done
step "times" 90 "$PYTHON" -m benchmarks.gpu --results "$OUT"
exit $failed
