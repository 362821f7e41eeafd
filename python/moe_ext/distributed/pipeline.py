"""Into how many chunks to cut the tokens of a layer: FSMoE's cost model, from a profile of the user's own machine.

Every stage of a chunk takes ``start + rows * per_row`` seconds: a fixed part that more chunks pay more often, and a
part that they share (FSMoE, ASPLOS 2025). FSMoE's two further stages, all-gather and reduce-scatter of tensor
parallelism, do not exist here: :class:`moe_ext.nn.ExpertParallelMoE` sends rows to every share of an expert.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_ext.distributed.exchange import Exchange

# Powers of two alone can be 9% slower than the best degree up to 16; with these between, 3%.
DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)


class LinearCost(NamedTuple):
    """Seconds of a stage: ``start + rows * per_row``."""

    start: float
    per_row: float

    def seconds(self, rows: float) -> float:
        return self.start + rows * self.per_row

    @staticmethod
    def fit(rows: Sequence[int], seconds: Sequence[float]) -> LinearCost:
        """Least squares of relative errors; neither part is negative.

        Raises:
            ValueError: fewer than two different numbers of rows, or a time that is not positive.
        """
        if len(rows) != len(seconds) or len(set(rows)) < 2 or min(seconds) <= 0:
            raise ValueError(
                "rows, seconds: expected one positive time for each of at least two different numbers of rows, "
                f"got {list(rows)} and {list(seconds)}"
            )
        n, t = np.asarray(rows, np.float64), np.asarray(seconds, np.float64)
        start, per_row = np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones_like(t), rcond=None)[0]
        if start < 0:
            start, per_row = 0.0, np.sum(n / t) / np.sum((n / t) ** 2)
        elif per_row < 0:
            start, per_row = np.sum(1 / t) / np.sum(1 / t**2), 0.0
        return LinearCost(float(start), float(per_row))


class PipelineCosts(NamedTuple):
    """The stages of one direction; in the backward ``dispatch`` is what sends the gradients out."""

    dispatch: LinearCost
    experts: LinearCost
    combine: LinearCost


class PipelineProfile(NamedTuple):
    """From :func:`profile_pipeline`; the same on all ranks, of the slowest one each."""

    forward: PipelineCosts
    backward: PipelineCosts


def pipeline_seconds(costs: PipelineCosts, rows: int, degree: int) -> float:
    """Seconds of one direction in ``degree`` equal chunks, as :func:`moe_ext.distributed.expert_parallel` runs them.

    One link carries all dispatches, then the combines, each as soon as its chunk is computed. What ends last is one of:
    the link that never waits, the experts that never wait, or the link with the first or the last chunk's experts.
    Without start costs, and with equal ways out and back, it is FSMoE's ``max(2 r t_a2a, 2 t_a2a + r t_experts)``.

    Raises:
        ValueError: ``degree`` < 1 or ``rows`` < 0.
    """
    if degree < 1 or rows < 0:
        raise ValueError(f"degree, rows: expected degree >= 1 and rows >= 0, got {degree} and {rows}")
    out, work, back = (stage.seconds(rows / degree) for stage in costs)
    return max(
        degree * (out + back), out + degree * work + back, degree * out + work + back, out + work + degree * back
    )


def choose_degree(costs: PipelineCosts | Sequence[PipelineCosts], rows: int, degrees: Sequence[int] = DEGREES) -> int:
    """The degree with the least time; the smaller one of two that are equally good.

    Args:
        costs: of one direction, or of several that run in the same chunks and whose times add up. For training
            ``[profile.forward, profile.backward]``; with a ``backward_degree`` of its own, ``profile.forward`` for the
            one and both again for the other, whose backward begins with the forward.
        rows: that a rank receives in one layer call, all chunks together.
        degrees: to choose from.

    Raises:
        ValueError: no degrees; else as :func:`pipeline_seconds`.
    """
    if not degrees:
        raise ValueError("degrees: expected at least one")
    directions = [costs] if isinstance(costs, PipelineCosts) else list(costs)
    return min(sorted(degrees), key=lambda degree: sum(pipeline_seconds(c, rows, degree) for c in directions))


def profile_pipeline(
    exchange: Exchange,
    run_experts: Callable[[Tensor], Tensor],
    hidden_size: int,
    rows: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounds: int = 5,
) -> PipelineProfile:
    """Time all-to-all and experts on this machine. Called by all ranks; synchronises with the device.

    Args:
        exchange: the layer's.
        run_experts: rows [num_rows, hidden_size] that require gradients -> expert outputs that hang on them.
        hidden_size, dtype, device: of the rows that travel.
        rows: numbers of rows to time, at least two; each is rounded up to a multiple of the ranks.
        rounds: repetitions, of which the median counts, after one that does not.

    Raises:
        ValueError: fewer than two different numbers of rows.
        ExchangeError: a collective failed.
    """
    share = exchange.num_ranks
    sizes = sorted({-(-max(n, 1) // share) * share for n in rows})
    if len(sizes) < 2:
        raise ValueError(f"rows: expected at least two different numbers, got {list(rows)}")
    place = torch.device(device)

    def clock() -> float:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter()

    def time_size(size: int) -> list[float]:
        samples = []
        for _ in range(rounds + 1):
            sent = torch.randn(size, hidden_size, dtype=torch.float32, device=place).to(dtype).requires_grad_()
            exchange.gather(torch.zeros(1, device=place), "the start of a timed exchange")
            start = clock()
            exchange.start(sent.detach(), None, what="timed rows").wait()
            exchanged = clock()
            output = run_experts(sent)
            computed = clock()
            torch.autograd.backward(output, torch.ones_like(output))
            samples.append([exchanged - start, computed - exchanged, clock() - computed])
        return [statistics.median(column) for column in zip(*samples[1:], strict=True)]

    times = torch.tensor([time_size(size) for size in sizes], dtype=torch.float64, device=place)
    slowest = exchange.gather(times, "the times of all ranks").amax(0).tolist()
    travel, forward, backward = (LinearCost.fit(sizes, column) for column in zip(*slowest, strict=True))
    return PipelineProfile(PipelineCosts(travel, forward, travel), PipelineCosts(travel, backward, travel))
