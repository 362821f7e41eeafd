"""The steps of bench/gpu_pass.sh, in the folder and with the moe_ext that it has prepared.

Every step is a process of its own with a limit of its own, so that a kernel that hangs or faults costs its own step
only; steps that measure nothing run several at once. OUT holds few files, written as the steps end:
    verdict.txt  a line for each step      report.txt  the end of each step's output
    tests.txt, tests.jsonl  of bench/gpu_tests.py      *.json  of the benchmark, a row at a time
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import gpu_smoke

TOTAL_SECONDS = 530.0
REPORT_CHARACTERS = 6000  # of one step
SMOKE_SECONDS = 45.0
# Of the benchmark, with the seconds and rounds they get: what the library stands for first.
TABLES = (("B", 60, 7), ("A", 90, 5), ("C,D", 60, 9))
IMPORT_CHECK = """
import json, torch, moe_ext
info = moe_ext.build_info(); print(json.dumps(info, indent=1)); print(moe_ext.__file__)
assert info['cuda'], 'built without CUDA'
missing = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith('moe_ext::')
           and not torch._C._dispatch_has_kernel_for_dispatch_key(s.name, 'CUDA')]
assert not missing, missing
print(torch.cuda.get_device_properties(0))
"""


@dataclass
class Step:
    name: str
    seconds: float
    command: list[str]


class Pass:
    """Runs steps, keeps verdict.txt and report.txt up to date."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.deadline = out, time.monotonic() + seconds
        self.verdict: list[str] = []
        self.failed: set[str] = set()
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.txt").write_text("")

    def say(self, line: str) -> None:
        self.verdict.append(line)
        print(line, flush=True)
        (self.out / "verdict.txt").write_text("\n".join(self.verdict) + "\n")

    def run(self, steps: list[Step], jobs: int = 1) -> None:
        """All of them, at most ``jobs`` at once, in order."""
        waiting, active = list(steps), []
        with tempfile.TemporaryDirectory() as folder:
            try:
                while waiting or active:
                    while waiting and len(active) < jobs:
                        step = waiting.pop(0)
                        log = Path(folder) / f"{step.name}.log"
                        active.append((step, self._start(step, log), log, time.monotonic()))
                    time.sleep(0.05)
                    active = [running for running in active if not self._ended(*running)]
            finally:
                for _, process, _, _ in active:
                    kill(process)

    def _start(self, step: Step, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                    start_new_session=True)  # fmt: skip

    def _ended(self, step: Step, process: subprocess.Popen[bytes], log: Path, start: float) -> bool:
        now = time.monotonic()
        status = process.poll()
        word = "PASS" if status == 0 else f"FAIL status {status}"
        if status is None:
            if now - start < step.seconds and now < self.deadline:
                return False
            kill(process)
            word = "FAIL out of time"
        text = log.read_text(errors="replace")
        with (self.out / "report.txt").open("a") as report:
            report.write(f"==== {step.name}: {word}, {now - start:.0f} s\n{text[-REPORT_CHARACTERS:]}\n")
        last = "" if status == 0 else ": " + next((x for x in reversed(text.splitlines()) if x.strip()), "")[:160]
        if status != 0:
            self.failed.add(step.name)
        self.say(f"{word}  {step.name}  {now - start:.0f} s{last}")
        return True


def kill(process: subprocess.Popen[bytes]) -> None:
    """With everything that it started: bench/gpu_tests.py ends its own children where it is asked to."""
    for kind, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-X", "faulthandler", *arguments]


def smoke(*pieces: str) -> list[str]:
    return python("-m", "bench.gpu_smoke", *pieces)


def bench(*options: str) -> list[str]:
    return python("-m", "bench", *options)


def sanitizer_steps(seconds: float) -> list[Step]:
    if not shutil.which("compute-sanitizer"):
        return []
    pieces = [("memcheck", ["gates", "layers-float32", "layers-bfloat16", "layer-128x256", "layer-64x256"]),
              ("racecheck", ["gates", "layers-float32"]),
              ("synccheck", ["layer-128x128", "layers-bfloat16"])]  # fmt: skip
    return [
        Step(tool, seconds, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *smoke(*wanted)])
        for tool, wanted in pieces
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_pass", description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args(arguments).out.resolve()
    work = Pass(out, TOTAL_SECONDS)
    packages = f"{sys.executable} -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|moe|liger)'"
    work.run(
        [
            Step("machine", 20, ["bash", "-c", f"nvidia-smi; {packages}"]),
            Step("import", 40, python("-c", IMPORT_CHECK)),
        ],
        jobs=2,
    )
    if "import" not in work.failed:
        # Each piece in a process of its own, many at once: which ones hang is known after the time that one takes.
        work.run([Step(f"smoke-{piece}", SMOKE_SECONDS, smoke(piece)) for piece in gpu_smoke.PIECES], jobs=6)
        tests = Step("tests", 190, python("-m", "bench.gpu_tests", str(out), "--seconds", "180"))
        work.run([tests, *sanitizer_steps(150)], jobs=4)
        for tables, seconds, rounds in TABLES:
            options = ["--profile", "gpu", "--tables", tables, "--rounds", str(rounds), "--out", str(out)]
            work.run([Step(f"bench-{tables.lower()}", seconds, bench(*options))])
        work.run([Step("tiles", 60, bench("tune-tiles", "--rounds", "5", "--out", str(out)))])
    if (out / "tests.txt").exists():
        print((out / "tests.txt").read_text()[-4000:])
    print("\n".join(work.verdict))
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())
