#!/usr/bin/env bash
# One GPU pass over an installed moe_ext: bench/gpu_pass.sh OUT [WHEEL]
#
# Installs WHEEL if one is given, then: machine, import, GPU tests, compute-sanitizer, benchmark tables. Logs and JSON go
# to OUT. Every step has its own limit, together under 9 minutes; a failing step does not stop the next. The last lines
# are the verdict. Exit status: 0 all passed, 1 something failed, 2 wrong use, 3 no GPU.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: bench/gpu_pass.sh OUT [WHEEL]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheel=${2:+$(realpath "$2")}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
  echo "no GPU: torch.cuda.is_available() is False (or torch is not installed)"
  exit 3
fi

# The tests and the harness come from the checkout, moe_ext from where it is installed, never from python/.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/tests" "$root/bench" "$work"/
cat > "$work/pytest.ini" <<'INI'
[pytest]
pythonpath = tests .
addopts = -ra
INI
cd "$work" || exit 1
if [ -n "$wheel" ]; then
  "$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$wheel" || exit 1
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

verdict=()
failed=0
step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    verdict+=("PASS  $name  $((SECONDS - start)) s")
  else
    failed=1
    verdict+=("FAIL  $name  $((SECONDS - start)) s  status $status: $(tail -n 1 "$out/$name.log" | cut -c1-160)")
  fi
}
skip() { verdict+=("SKIP  $1  $2"); }

step machine 15 bash -c "nvidia-smi; $python -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|moe|liger)'"
step import 30 "$python" -c "
import json, torch, moe_ext
info = moe_ext.build_info(); print(json.dumps(info, indent=1)); print(moe_ext.__file__)
assert info['cuda'], 'built without CUDA'
missing = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith('moe_ext::')
           and not torch._C._dispatch_has_kernel_for_dispatch_key(s.name, 'CUDA')]
assert not missing, missing"
step smoke 30 "$python" -m bench.gpu_smoke
step tests 150 "$python" -m pytest -q -x --maxfail=20 tests/gpu
if command -v compute-sanitizer >/dev/null; then
  step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m bench.gpu_smoke
  step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m bench.gpu_smoke
else
  skip sanitizer "compute-sanitizer is not on PATH"
fi
step bench-c 30 "$python" -m bench --profile gpu --tables C --rounds 9 --out "$out"
step bench-b 45 "$python" -m bench --profile gpu --tables B --rounds 7 --out "$out"
step bench-d 25 "$python" -m bench --profile gpu --tables D --rounds 9 --out "$out"
step bench-a 90 "$python" -m bench --profile gpu --tables A --rounds 5 --out "$out"

printf '%s\n' "${verdict[@]}" | tee "$out/verdict.txt"
exit $failed
