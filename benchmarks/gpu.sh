#!/usr/bin/env bash
# benchmarks/gpu.sh OUT [NAME...]: on a machine with an NVIDIA GPU, build in place without network, run the GPU-marked
# tests and the benchmarks (all, or those named), leave OUT/machine.txt, OUT/log.txt and OUT/NAME.json, and print a short
# summary last. First nobody compiles, which takes minutes for a network; then, while time is left, the peers that do
# are added (OUT/NAME-compiled.json). Exit status 1 if a test or a benchmark failed; the benchmarks run in either case.
# With the one name "proofs" it runs the long tail in place of benchmarks: ten thousand random cases of each op, races
# looked for by repetition, and compute-sanitizer's four tools over the CUDA kernels; for a run of its own.
# PYTHON: the interpreter (python3). LIMIT: seconds for everything (560). FASTDIFF_COMMIT: what is measured, without git.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: benchmarks/gpu.sh OUT [NAME...]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2
shift
python=${PYTHON:-python3} limit=${LIMIT:-560} failed=() names=("$@")
log=$out/log.txt
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
: >"$log"

stage() { # NAME SECONDS COMMAND...: into the log, for so long at most, and within the limit
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  printf '\n==== %s, after %d s\n' "$name" "$SECONDS" >>"$log"
  [ "$left" -gt 5 ] || { failed+=("$name (no time left)"); return; }
  timeout $((left < most ? left : most)) "$@" >>"$log" 2>&1 || failed+=("$name (status $?)")
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" - <<'PY'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

print("python", platform.python_version(), "CUDA", torch.version.cuda)
for name in ("torch", "triton", "diffusers", "hypothesis", "pytest"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is missing")
PY
  "$python" -c 'from benchmarks.harness import commit; print("commit", commit())'
}

gpu_tests() { # the files with GPU-marked tests that can be imported here
  "$python" - tests/test_*.py <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
for path in map(Path, sys.argv[1:]):
    if "mark.gpu" not in path.read_text():
        continue
    try:
        __import__(path.stem)
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("fastdiff"):
            print(f"not run: {path}: {missing}", file=sys.stderr)
            continue
    except BaseException:  # pytest tells it better
        pass
    print(path)
PY
}

tests() {
  local files
  mapfile -t files < <(gpu_tests 2>>"$log")
  [ ${#files[@]} -eq 0 ] || stage tests 200 "${pytest[@]}" -m "gpu and not slow" "${at_once[@]}" "${files[@]}"
  [ ${#at_once[@]} -eq 0 ] || stage large 60 "${pytest[@]}" -m gpu -k 31_bits tests/test_gpu.py
}

benchmarks() {
  [ ${#names[@]} -gt 0 ] || {
    stage ceilings 60 "$python" -m benchmarks.ceilings "$out/ceilings.json"
    mapfile -t names < <("$python" -c 'import benchmarks; print(*sorted(benchmarks.NAMES, key="sampling".__eq__), sep="\n")')
  }
  for name in "${names[@]}"; do
    stage "$name" 400 "$python" -m benchmarks "$name" --no-slow --device cuda --seconds 0.4 --json "$out/$name.json"
  done
  for name in "${names[@]}"; do
    stage "$name compiled" 400 "$python" -m benchmarks "$name" --device cuda --seconds 0.4 --json "$out/$name-compiled.json"
  done
}

proofs() {
  stage long 400 "${pytest[@]}" -m "gpu and slow" "${at_once[@]}" tests/test_gpu_long.py
  local tool only checked="native and not 31_bits and not captured and (ops_equal or norm)"
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor is an allocation whose ends are known
  for tool in memcheck racecheck synccheck initcheck; do
    only=(--kernel-name kns=fastdiff)
    [ $tool != initcheck ] || only=() # which has to see what PyTorch's kernels write
    stage $tool 120 compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no "${only[@]}" \
      "${pytest[@]}" -m "gpu and not slow" -k "$checked" tests/test_gpu.py
  done
}

pytest=("$python" -m pytest -p no:cacheprovider)
at_once=() # Triton compiles on the CPU: with pytest-xdist a minute and a half instead of ten
! "$python" -c 'import xdist' 2>/dev/null || at_once=(-n 12 -p no:benchmark -k "not 31_bits")
describe >"$out/machine.txt" 2>&1
stage build 240 "$python" setup.py build_ext --inplace
stage backends 60 "$python" -c 'import fastdiff; print(fastdiff.explain("cuda"))'
if [ "${names[*]}" = proofs ]; then
  proofs
else
  tests
  benchmarks
fi

printf '\n'
cat "$out/machine.txt"
grep -hE '^not run|(passed|failed|skipped|deselected).* in [0-9.]+s' "$log"
grep -hoE 'note: .* is left out: .{1,40}' "$log" | sed 's/.*: \(.* is left out\)/\1/' | sort | uniq -c | head -n 8
files=("$out"/*.json)
[ ! -e "${files[0]}" ] || "$python" -m benchmarks.summary "${files[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[*]}"; exit 1; }
