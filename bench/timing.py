"""Medians of interleaved rounds: every contender once per round, so that a slow moment of the machine hits all.

On a GPU the time is that between two events. Before it the L2 cache is filled by reading, which leaves no lines behind
that the timed kernels would have to write back; then the device spins until the host has queued the whole call, so that
launches are not waited for, in eager calls as in graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 * 1024 * 1024  # more than any L2, so that a run starts from device memory
MIN_ROUND_SECONDS = 2e-3  # shorter bodies are repeated inside a round on the CPU
LONG_SECONDS = 0.1
SPIN_CYCLES_PER_SECOND = 2e9  # at least the clock of any GPU: on a slower one the spin only lasts longer
MAX_SPIN_SECONDS = 2e-3


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    best: float
    rounds: int
    samples: tuple[float, ...] = ()


class WarmUp(NamedTuple):
    """What the first calls of a contender say about its rounds."""

    repeats: int = 1
    spin_cycles: int = 0
    """On a GPU: what the device spins for before the call."""
    seconds: float | None = None
    """Of the call itself, where it can count as a round."""


class Timer:
    """Times contenders on one device.

    Args:
        device: ``cpu`` or ``cuda``.
        rounds: at most this many rounds.
        seconds: no further round starts once a contender set has taken this long.
    """

    def __init__(self, device: str, rounds: int, seconds: float) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda") if device == "cuda" else None

    def compare(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        start = time.perf_counter()
        warm_ups = {name: self._warm_up(run) for name, run in contenders.items()}
        # A warm-up long enough to be a round is one: the comparison with the peers has run everything once before.
        seconds = {name: [] if w.seconds is None else [w.seconds] for name, w in warm_ups.items()}
        for _ in range(self.rounds):
            if min(map(len, seconds.values())) >= 3 and time.perf_counter() - start > self.seconds:
                break
            for name, run in contenders.items():
                seconds[name].append(self._once(run, warm_ups[name]))
        return {name: Timing(statistics.median(s), min(s), len(s), tuple(s)) for name, s in seconds.items()}

    def device_is_lost(self) -> bool:
        """Whether an earlier kernel left an error that every later one would report."""
        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception:  # what torch raises for it differs between versions
            return True
        return False

    def _warm_up(self, run: Callable[[], Any]) -> WarmUp:
        if self.device == "cuda":
            return WarmUp(spin_cycles=self._cycles_to_queue(run))
        start = time.perf_counter()
        run()
        taken = time.perf_counter() - start
        count = max(1, min(1000, int(MIN_ROUND_SECONDS / max(taken, 1e-7))))
        return WarmUp(count, seconds=taken if taken > LONG_SECONDS else None)

    @staticmethod
    def _cycles_to_queue(run: Callable[[], Any]) -> int:
        """The cycles that the device must spin for, to be still busy when the host has queued ``run``."""
        torch.cuda.synchronize()
        for _ in range(3):
            start = time.perf_counter()
            run()
            queued = time.perf_counter() - start
            torch.cuda.synchronize()
            if time.perf_counter() - start > LONG_SECONDS:
                break
        return int(1.5 * min(queued, MAX_SPIN_SECONDS) * SPIN_CYCLES_PER_SECOND)

    def _once(self, run: Callable[[], Any], warm_up: WarmUp) -> float:
        if self.flush is None:
            start = time.perf_counter()
            for _ in range(warm_up.repeats):
                run()
            return (time.perf_counter() - start) / warm_up.repeats
        self.flush.sum()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(warm_up.spin_cycles)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` captured once as a CUDA graph; for cases whose launches would be most of the time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
