"""FasterMoE's rule for experts that are worth a copy on every rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def shadowed_experts(
    loads: ArrayLike, *, compute_seconds_per_row: float, send_seconds_per_row: float, send_seconds_per_expert: float
) -> NDArray[np.bool_]:
    """[num_layers, num_experts] bool: the experts whose weights every rank should get for a step (FasterMoE, PPoPP'22).

    In descending load, an expert is shadowed as long as the modelled step gets shorter: three passes over the rows of
    the most loaded expert that is not shadowed (forward, input and weight gradients), four transfers of those rows, and
    one transfer of each shadowed expert's weights::

        latency(k) = 3 * compute * B_k + 4 * send * B_k + k * send_expert        B_k: the k-th largest load, from 0

    At least one expert stays.

    Args:
        loads: [num_layers, num_experts] rows of each expert in the step.
        compute_seconds_per_row: the expert's forward pass for one row; FLOPs of a row / FLOP/s.
        send_seconds_per_row: one hidden row over the network; bytes / bandwidth.
        send_seconds_per_expert: one expert's weights over the network.

    Raises ValueError for loads of another shape, and for costs or loads that are negative or not finite.
    """
    array = np.asarray(loads, dtype=np.float64)
    costs = {
        "compute_seconds_per_row": compute_seconds_per_row,
        "send_seconds_per_row": send_seconds_per_row,
        "send_seconds_per_expert": send_seconds_per_expert,
    }
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"loads: expected [num_layers, num_experts], got {list(array.shape)}")
    for name, values in {"loads": array, **{name: np.asarray(cost) for name, cost in costs.items()}}.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name}: expected finite numbers that are not negative")
    order = np.argsort(-array, axis=1, kind="stable")
    descending = np.take_along_axis(array, order, axis=1)
    per_row = 3 * compute_seconds_per_row + 4 * send_seconds_per_row
    latency = per_row * descending + send_seconds_per_expert * np.arange(array.shape[1])
    # Up to the first expert that does not help.
    helps = np.logical_and.accumulate(latency[:, 1:] < latency[:, :-1], axis=1)
    shadowed = np.zeros(array.shape, dtype=np.bool_)
    np.put_along_axis(shadowed, order[:, :-1], helps, axis=1)
    return shadowed
