#!/usr/bin/env bash
# One GPU pass over an installed moe_ext: bench/gpu_pass.sh OUT [WHEEL]
#
# Installs WHEEL if one is given, then runs bench/gpu_pass.py: machine, import, a smoke test of each kernel family, GPU
# tests, compute-sanitizer, benchmark tables. What it finds goes to OUT as it finds it. Every step has its own limit, all
# end 560 s after the script's start; a step that fails, hangs or faults does not stop the next. The last lines are the
# verdict, which is also how OUT/report.txt begins: no tee is needed, and OUT holds 7 files, where no more than 8 may
# come back from a machine. Exit status: 0 all passed, 1 something failed, 2 wrong use, 3 no GPU.
#
# MOE_EXT_COMMIT is the commit that the results name where the checkout has no history (a copy of its files):
#   MOE_EXT_COMMIT=<what git describe --always --dirty=+ says here> bench/gpu_pass.sh OUT WHEEL
set -uo pipefail

start=$(date +%s)
if [ $# -lt 1 ]; then
  echo "usage: bench/gpu_pass.sh OUT [WHEEL]" >&2
  exit 2
fi
if [ $# -gt 2 ]; then
  echo "expected OUT and at most one wheel, got $(($# - 1)): ${*:2}" >&2
  exit 2
fi
if [ $# -eq 2 ] && { [ ! -f "$2" ] || [ "${2%.whl}" = "$2" ]; }; then
  echo "expected a wheel, found none: $2" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wheel=${2:+$(realpath "$2")}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if ! why=$(timeout 150 "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>&1); then
  echo "no GPU: torch.cuda.is_available() is False (or torch is not installed)"
  echo "$why" | tail -n 3
  exit 3
fi
export MOE_EXT_COMMIT=${MOE_EXT_COMMIT:-$(git -C "$root" describe --always --dirty=+ 2>/dev/null)}

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
  if ! "$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$wheel"; then
    echo "FAIL  the wheel could not be installed: $wheel"
    exit 1
  fi
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" -m bench.gpu_pass "$out" --start "$start"
