#!/usr/bin/env bash
# benchmarks/gpu.sh OUT: on a machine with an NVIDIA GPU, build in place without network, run the GPU-marked tests and
# every benchmark, leave logs and JSON in OUT, and print a short summary last. Fails if tests fail or a result is wrong.
# PYTHON names the interpreter (python3). LIMIT is the time for everything, in seconds (560).
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} limit=${LIMIT:-560} status=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

within() { # SECONDS COMMAND...: for so long at most, and within the limit
  local left=$((limit - SECONDS)) most=$1
  shift
  timeout $((left < 1 ? 1 : left < most ? left : most)) "$@"
}

has() { "$python" -c "import $1" 2>/dev/null; }

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" - <<'PY'
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, "commit", end=" ")
from benchmarks.harness import commit
print(commit())
for name in ("triton", "diffusers", "hypothesis"):
    try:
        print(name, __import__(name).__version__)
    except Exception as error:
        print(f"{name} is missing: {error}")
PY
} >"$out/machine.txt" 2>&1

within 240 "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1 || echo "the build failed" >>"$out/build.log"
within 60 "$python" -c 'import fastdiff; print(fastdiff.explain("cuda"))' >"$out/backends.txt" 2>&1

tests=$(grep -lE 'mark\.gpu' tests/test_*.py || true)
if ! has hypothesis && [ -n "$tests" ]; then
  skipped=$(grep -lE '^(import|from) hypothesis' $tests || true)
  tests=$(grep -LE '^(import|from) hypothesis' $tests || true)
fi
if [ -n "$tests" ]; then
  within 200 "$python" -m pytest -m gpu -p no:cacheprovider $tests >"$out/tests.log" 2>&1 || status=1
else
  echo "no GPU-marked tests could be run" >"$out/tests.log"
fi
[ -z "${skipped:-}" ] || echo "not run, for hypothesis is missing:" $skipped >>"$out/tests.log"

for name in $("$python" -c 'import benchmarks; print(*benchmarks.NAMES)'); do
  within 300 "$python" -m benchmarks "$name" --device cuda --json "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.log"
  code=$?
  [ $code -eq 0 ] || { status=1; echo "$name ended with status $code" >>"$out/$name.log"; }
done

echo
cat "$out/machine.txt"
tail -n 1 "$out/build.log"
tail -n 2 "$out/tests.log"
grep -h 'is left out\|ended with' "$out"/*.log | cut -c1-160 | sort | uniq | head -n 12
files=("$out"/*.json)
[ ! -e "${files[0]}" ] || "$python" -m benchmarks.summary "${files[@]}"
exit $status
