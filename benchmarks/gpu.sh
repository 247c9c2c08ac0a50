#!/usr/bin/env bash
# Everything a GPU shows of the Triton backend, in one call of a few minutes; each step that finds no GPU says so.
# Wants torch >= 2.11 and Triton >= 3.6 in PYTHON's environment. The table comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
failed=0

step() {
  echo "== $1"
  shift
  "$@" || { echo "FAILED: $*"; failed=1; }
}

step "build" env TCLR_KERNELS_REQUIRE_NATIVE=0 "$PYTHON" setup.py --quiet build_ext --inplace
step "what is here" "$PYTHON" -m tclr_kernels.info
step "tests on the GPU" "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu
if command -v compute-sanitizer >/dev/null && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer $tool" timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m benchmarks.gpu --sanitize
  done
else
  echo "== compute-sanitizer: skipped, it or a CUDA device is missing"
fi
step "times" "$PYTHON" -m benchmarks.gpu --results "$OUT"
exit $failed
