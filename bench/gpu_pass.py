"""The steps of bench/gpu_pass.sh, in the folder and with the moe_ext that it has prepared.

Every step is a process of its own with a limit of its own, so that a kernel that hangs or faults costs its own step
only; steps that measure nothing run several at once. What the smoke pieces find says which tiles the later steps use.
OUT holds few files, written as the steps end:
    report.txt  a line for each step, then the end of each step's output
    tests.txt, tests.jsonl  of bench/gpu_tests.py      *.json  of the benchmark, a row at a time
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .gpu_names import CHOSEN_TILES, LAYERS, PRODUCTS, SMOKE_PIECES, TILE_VARIABLE, TILES
from .gpu_processes import kill, sanitized

TOTAL_SECONDS = 560.0  # since the script started
REPORT_CHARACTERS = 6000  # of one step
IMPORT_SECONDS = 120.0  # of a machine that has read nothing of torch yet
SMOKE_SECONDS = 45.0
TEST_SECONDS, LEAST_TEST_SECONDS = 190.0, 70.0
TILE_SECONDS = 60.0
# A case of the benchmark that takes longer hangs; the first one of a layer also imports transformers.
CASE_SECONDS = {"B": 25, "A": 40, "C,D": 40, "tiles": 25}
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
    tile: str = ""  # forced on every product


@dataclass
class Running:
    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    start: float


class Pass:
    """Runs steps, keeps report.txt up to date."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.deadline = out, time.monotonic() + seconds
        self.verdict: list[str] = []
        self.outputs: list[str] = []
        self.failed: set[str] = set()
        self.hung: set[str] = set()  # of those: out of time
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        self.verdict.append(line)
        print(line, flush=True)
        (self.out / "report.txt").write_text("\n".join([*self.verdict, "", *self.outputs]) + "\n")

    def run(self, steps: list[Step], jobs: int = 1) -> None:
        """All of them, at most ``jobs`` at once, in order."""
        waiting, active = list(steps), []
        with tempfile.TemporaryDirectory() as folder:
            try:
                while waiting or active:
                    while waiting and len(active) < jobs:
                        step = waiting.pop(0)
                        if self.left() > 0:
                            active.append(self._start(step, Path(folder) / f"{step.name}.log"))
                        else:
                            self.failed.add(step.name)
                            self.say(f"FAIL not reached  {step.name}")
                    time.sleep(0.05)
                    now = time.monotonic()
                    late = [r for r in active if now >= min(r.start + r.step.seconds, self.deadline)]
                    stopped = {r.step.name for r in late if r.process.poll() is None}
                    # bench/gpu_tests.py ends its own children where it is asked to.
                    kill((r.process for r in late), (signal.SIGTERM, signal.SIGKILL))
                    over = [r for r in active if r in late or r.process.poll() is not None]
                    active = [r for r in active if r not in over]
                    for running in over:
                        self._tell(running, running.step.name in stopped)
            finally:
                kill(r.process for r in active)

    def _start(self, step: Step, log: Path) -> Running:
        variables = {name: value for name, value in os.environ.items() if name != TILE_VARIABLE}
        if step.tile:
            variables[TILE_VARIABLE] = step.tile
        with log.open("wb") as output:
            process = subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, env=variables,
                                       stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        return Running(step, process, log, time.monotonic())

    def _tell(self, running: Running, stopped: bool) -> None:
        name, status, seconds = running.step.name, running.process.poll(), time.monotonic() - running.start
        word = "FAIL out of time" if stopped else "PASS" if status == 0 else f"FAIL status {status}"
        text = running.log.read_text(errors="replace")
        self.outputs.append(f"==== {name}: {word}, {seconds:.0f} s\n{text[-REPORT_CHARACTERS:]}")
        last = "" if word == "PASS" else ": " + next((x for x in reversed(text.splitlines()) if x.strip()), "")[:160]
        self.failed |= {name} if word != "PASS" else set()
        self.hung |= {name} if stopped else set()
        self.say(f"{word}  {name}  {seconds:.0f} s{last}")


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-X", "faulthandler", *arguments]


def smoke(*pieces: str) -> list[str]:
    return python("-m", "bench.gpu_smoke", *pieces)


@dataclass
class Findings:
    """What the smoke pieces say of the tiles."""

    tiles: list[str]  # whose products and whose layer are right
    broken: list[str]
    hung: set[str]  # pieces

    @property
    def forced(self) -> str:
        """The tile of every product, if one that the cost model may choose does not work."""
        return self.tiles[0] if self.tiles and set(CHOSEN_TILES) & set(self.broken) else ""


def findings(work: Pass) -> Findings:
    broken = [tile for tile in TILES if {f"smoke-{PRODUCTS[tile]}", f"smoke-{LAYERS[tile]}"} & work.failed]
    hung = {piece for piece in SMOKE_PIECES if f"smoke-{piece}" in work.hung}
    found = Findings([tile for tile in TILES if tile not in broken], broken, hung)
    if found.forced:
        work.say(f"NOTE  tiles {', '.join(broken)} fail: tests, sanitizer and tables A and B run on {found.forced} "
                 f"alone, by {TILE_VARIABLE}")  # fmt: skip
    elif not found.tiles:
        work.say("NOTE  no sm_90a tile works: no tables A and B, no tile sweep, tables C and D before the tests")
    elif broken:
        work.say(
            f"NOTE  tiles {', '.join(broken)} fail: left out of tests and sweep; the cost model takes none of them"
        )
    return found


def sanitizer_steps(work: Pass, found: Findings, seconds: float) -> list[Step]:
    """Pieces that hang without a sanitizer are left out, and the layers on tiles if none works."""
    wanted = {"memcheck": ["gates", "layers-float32", "layers-bfloat16", LAYERS["128x256"], LAYERS["64x256"]],
              "racecheck": ["gates", "layers-float32"],
              "synccheck": [LAYERS["128x128"], "layers-bfloat16"]}  # fmt: skip
    without = found.hung | (set(LAYERS.values()) if not found.tiles else set())
    steps = []
    for tool, listed in wanted.items():
        pieces = [piece for piece in listed if piece not in without]
        command = sanitized(tool, smoke(*pieces)) if pieces else None
        if command:
            steps.append(Step(tool, seconds, command, found.forced))
        else:
            work.say(f"SKIP  {tool}  {'compute-sanitizer is not there' if pieces else 'every piece of it hangs'}")
    return steps


def bench_step(out: Path, tables: str, seconds: float, rounds: int, tile: str = "") -> Step:
    options = ["--profile", "gpu", "--tables", tables, "--rounds", str(rounds), "--out", str(out)]
    options += ["--case-seconds", str(CASE_SECONDS[tables])]
    return Step(f"bench-{tables.lower()}", seconds, python("-m", "bench", *options), tile)


def measuring_steps(out: Path, found: Findings) -> list[Step]:
    """What the library stands for first. Decode is left to the model: its kernel is none of the tiles."""
    decode = bench_step(out, "C,D", 60, 9)
    if not found.tiles:
        return [decode]
    swept = [*found.tiles, *(["cutlass_128x256"] if "products-cutlass" not in found.hung else [])]
    sweep = ["tune-tiles", "--rounds", "5", "--case-seconds", str(CASE_SECONDS["tiles"]), "--out", str(out),
             "--tiles", *swept]  # fmt: skip
    return [bench_step(out, "B", 60, 7, found.forced), bench_step(out, "A", 90, 5, found.forced), decode,
            Step("tiles", TILE_SECONDS, python("-m", "bench", *sweep))]  # fmt: skip


def tests_step(out: Path, found: Findings, left: float) -> Step:
    """As long as the steps after it leave."""
    seconds = min(TEST_SECONDS, max(left, LEAST_TEST_SECONDS))
    command = python("-m", "bench.gpu_tests", str(out), "--seconds", f"{seconds - 10:.0f}",
                     "--tiles", ",".join(found.tiles))  # fmt: skip
    return Step("tests", seconds, command, found.forced)


def run_pass(work: Pass) -> None:
    packages = f"{sys.executable} -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|moe|liger)'"
    work.run(
        [
            Step("machine", 20, ["bash", "-c", f"nvidia-smi; {packages}"]),
            Step("import", IMPORT_SECONDS, python("-c", IMPORT_CHECK)),
        ],
        jobs=2,
    )
    if "import" in work.failed - work.hung:  # one that is slow has read what the next one needs
        return
    # Each piece in a process of its own, all at once: which ones hang is known after the time that one takes.
    pieces = [Step(f"smoke-{piece}", SMOKE_SECONDS, smoke(piece)) for piece in SMOKE_PIECES]
    work.run(pieces, jobs=len(pieces))
    found = findings(work)
    later = measuring_steps(work.out, found)
    if not found.tiles:
        work.run(later)
        later = []
    tests = tests_step(work.out, found, work.left() - sum(step.seconds for step in later))
    work.run([tests, *sanitizer_steps(work, found, min(150.0, tests.seconds))], jobs=4)
    work.run(later)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_pass", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=float, default=time.time(), help="when the time began to run (default: now)")
    options = parser.parse_args(arguments)
    work = Pass(options.out.resolve(), TOTAL_SECONDS - (time.time() - options.start))
    run_pass(work)
    if (work.out / "tests.txt").exists():
        print((work.out / "tests.txt").read_text()[-4000:])
    print("\n".join(work.verdict))
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())
