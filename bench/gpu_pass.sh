#!/usr/bin/env bash
# One GPU pass over an installed moe_ext: bench/gpu_pass.sh OUT [WHEEL]
#
# Installs WHEEL if one is given, then runs bench/gpu_pass.py: machine, import, a smoke test of each kernel family, GPU
# tests, compute-sanitizer, benchmark tables. What it finds goes to OUT as it finds it. Every step has its own limit,
# together under 9 minutes; a step that fails, hangs or faults does not stop the next. The last lines are the verdict.
# Exit status: 0 all passed, 1 something failed, 2 wrong use, 3 no GPU.
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

"$python" -m bench.gpu_pass "$out"
