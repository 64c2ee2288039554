#!/usr/bin/env bash
# A whole round on a machine with an NVIDIA GPU, from a bare checkout, offline, with that machine's own torch (2.11 or later),
# Triton and nvcc, in under nine minutes:
#
#     benchmarks/device.sh [build] [correctness] [sanitizer] [ops] [ppm] [report]        all of them without arguments
#
# Logs, JSON and report.md go to the folder that OUT names (build/device). A section that fails does not stop the others; the
# exit status is the number that failed. What a machine cannot do (no GPU, no nvcc, no compute-sanitizer) is said, and skipped.
# Each section has its share of the nine minutes, and keeps what it has when that ends; PATIENCE=3 gives it three times as much.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/device}
SITE=$PWD/build/device-site # the package as it would be installed, built for this GPU alone
mkdir -p "$OUT"
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset PSPNET_FAST_BACKEND TRITON_INTERPRET PSPNET_FAST_CUDA_EMULATION

$PYTHON -c 'import torch' || { echo "device.sh: $PYTHON has no torch: set PYTHON" >&2; exit 64; }
within() { timeout "$(($1 * ${PATIENCE:-1}))" "${@:2}"; }
failed=0
skipped() { echo "$1: not done: $2"; }
has_gpu() { $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
needs_gpu() { has_gpu && [ -d "$SITE/pspnet_fast" ]; }
why_not() { has_gpu && echo "nothing is built in $SITE: run the section build first" || echo "torch finds no CUDA GPU here"; }

build() {
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || { skipped build "there is no nvcc"; return; }
  local architecture
  architecture=$($PYTHON -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "9.0")')
  echo "build: for compute capability $architecture, log in $OUT/build.log"
  rm -rf "$SITE"
  PSPNET_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS=${MAX_JOBS:-$(nproc)} within 130 \
    $PYTHON setup.py build --build-base build/device-base --build-lib "$SITE" >"$OUT/build.log" 2>&1 ||
    { tail -n 30 "$OUT/build.log"; return 1; }
  $PYTHON -P -m pspnet_fast.cli doctor | tee "$OUT/machine.txt"
}

correctness() {
  needs_gpu || { skipped correctness "$(why_not)"; return; }
  local parallel=()
  $PYTHON -c 'import xdist' 2>/dev/null && parallel=(-n 6)
  within 170 $PYTHON -P -m pytest -q "${parallel[@]}" -p no:cacheprovider -o addopts=--import-mode=importlib \
    tests/test_gpu.py tests/ops tests/nn tests/test_geometry.py 2>&1 | tee "$OUT/correctness.log" | tail -n 25
}

sanitizer() {
  needs_gpu || { skipped sanitizer "$(why_not)"; return; }
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    { skipped sanitizer "compute-sanitizer is not installed"; return; }
  local status=0
  for check in memcheck racecheck; do
    # Without torch's cache every tensor is an allocation of its own, so that memcheck sees where it ends.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 30 "$tool" --tool $check --error-exitcode 9 \
      $PYTHON benchmarks/device.py sanitize >"$OUT/sanitizer_$check.log" 2>&1 || status=1
    echo "sanitizer: $check: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/sanitizer_$check.log" || tail -n 3 "$OUT/sanitizer_$check.log")"
  done
  return $status
}

measure() {
  needs_gpu || { skipped "$1" "$(why_not)"; return; }
  within 90 $PYTHON benchmarks/device.py "$1" --output "$OUT/$1.json"
}
ops() { measure ops; }
ppm() { measure ppm; }

report() { $PYTHON benchmarks/device.py report --output "$OUT"; }

for section in "${@:-build correctness sanitizer ops ppm report}"; do
  for name in $section; do
    case $name in
      build | correctness | sanitizer | ops | ppm | report) ;;
      *) echo "device.sh: no section $name: build, correctness, sanitizer, ops, ppm, report" >&2; exit 64 ;;
    esac
    echo "== $name"
    $name || { echo "$name: failed"; failed=$((failed + 1)); }
  done
done
exit $failed
