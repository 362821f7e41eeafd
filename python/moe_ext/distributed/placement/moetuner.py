"""MoETuner: expert placement by integer programs, balanced load first, cheap transitions between layers second."""

from __future__ import annotations

import importlib
import math
from itertools import combinations, pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_ext import _host
from moe_ext.distributed.placement.layout import ExpertPlacement

Layers = NDArray[np.int64]


def moetuner_placement(
    counts: ArrayLike,
    transitions: ArrayLike,
    num_ranks: int,
    *,
    seconds_per_byte: ArrayLike | None = None,
    relative_gap: float = 0.025,
    time_limit: float = 60.0,
    joint: bool = True,
) -> ExpertPlacement:
    """Both programs one after the other (MoETuner); the same number of experts on every rank, none replicated.

    Args:
        counts: [num_layers, num_experts], ``RoutingTrace.counts``.
        transitions: [num_layers - 1, num_experts, num_experts], ``RoutingTrace.transitions``.
        num_ranks: a divisor of num_experts.
        seconds_per_byte, relative_gap, time_limit, joint: of :func:`balanced_clusters` and :func:`assign_clusters`.

    Raises ImportError without scipy (``pip install 'moe_ext[placement]'``), ValueError for shapes that do not fit.
    """
    clusters = balanced_clusters(counts, num_ranks, relative_gap=relative_gap, time_limit=time_limit)
    ranks = assign_clusters(
        cluster_transitions(clusters, transitions, num_ranks),
        seconds_per_byte,
        relative_gap=relative_gap,
        time_limit=time_limit,
        joint=joint,
    )
    rank_of_expert = np.take_along_axis(ranks, clusters, axis=1)
    phy2log = np.argsort(rank_of_expert, axis=1, kind="stable")
    return ExpertPlacement.from_phy2log(phy2log, clusters.shape[1], num_ranks)


def balanced_clusters(
    counts: ArrayLike, num_clusters: int, *, relative_gap: float = 0.025, time_limit: float = 60.0
) -> Layers:
    """The first program: [num_layers, num_experts] int64, the cluster of every expert.

    In every layer num_clusters clusters of equal size, with the least ``sum over clusters |load - mean load|``.

    Args:
        counts: [num_layers, num_experts].
        relative_gap: stop within this fraction of the layer's load from the optimum; 0 for the optimum.
        time_limit: seconds per layer; then the best found counts, never worse than EPLB's packing or the given order.

    Raises ImportError without scipy, ValueError if num_clusters does not divide num_experts.
    """
    loads = np.asarray(counts, dtype=np.float64)
    if loads.ndim != 2 or num_clusters < 1 or loads.shape[1] == 0 or loads.shape[1] % num_clusters:
        raise ValueError(
            "counts: expected [num_layers, num_experts] with num_experts a multiple of "
            f"{num_clusters} clusters, got {list(loads.shape)}"
        )
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ValueError("counts: expected finite numbers that are not negative")
    _check_limits(relative_gap, time_limit)
    size = loads.shape[1] // num_clusters
    packed = np.argsort(_host.balance_experts(loads, loads.shape[1], 1, 1, num_clusters), axis=1) // size
    in_order = np.arange(loads.shape[1]) // size
    clusters = np.empty(loads.shape, dtype=np.int64)
    for layer, load in enumerate(loads):
        candidates = [in_order, packed[layer]]
        if load.any() and num_clusters > 1:
            found = _solve_clusters(load / load.sum(), num_clusters, relative_gap, time_limit)
            candidates += [] if found is None else [found]
        clusters[layer] = min(candidates, key=lambda cluster: _imbalance(cluster, load, num_clusters))
    return clusters


def _imbalance(cluster: NDArray[Any], load: NDArray[np.float64], num_clusters: int) -> float:
    totals = np.bincount(cluster, weights=load, minlength=num_clusters)
    return float(np.abs(totals - totals.mean()).sum())


def _solve_clusters(
    load: NDArray[np.float64], num_clusters: int, relative_gap: float, time_limit: float
) -> NDArray[np.int64] | None:
    """Variables: x[cluster, expert], the deviation d[cluster], and one that is always 1.

    That one adds the whole load to the objective, whose lower bound would else be 0 and no gap relative to it small.
    """
    scipy_optimize, sparse = _scipy("optimize"), _scipy("sparse")
    experts, binaries = len(load), num_clusters * len(load)
    eye, ones = sparse.eye_array(num_clusters), np.ones((1, experts))
    constant = sparse.coo_array((num_clusters, 1))
    totals = sparse.kron(eye, load[None, :])
    once = sparse.hstack([sparse.kron(np.ones((1, num_clusters)), sparse.eye_array(experts)),
                          sparse.coo_array((experts, num_clusters + 1))])  # fmt: skip
    full = sparse.hstack([sparse.kron(eye, ones), sparse.coo_array((num_clusters, num_clusters + 1))])
    mean = load.sum() / num_clusters
    constraints = [
        scipy_optimize.LinearConstraint(once, 1, 1),
        scipy_optimize.LinearConstraint(full, experts // num_clusters, experts // num_clusters),
        scipy_optimize.LinearConstraint(sparse.hstack([totals, -eye, constant]), -np.inf, mean),
        scipy_optimize.LinearConstraint(sparse.hstack([totals, eye, constant]), mean, np.inf),
    ]
    # Clusters are alike: numbered by their first expert, expert e is in one of the first e + 1.
    upper = np.tril(np.ones((experts, num_clusters))).T.ravel()
    result = scipy_optimize.milp(
        np.concatenate([np.zeros(binaries), np.ones(num_clusters + 1)]),
        integrality=np.concatenate([np.ones(binaries), np.zeros(num_clusters + 1)]),
        bounds=scipy_optimize.Bounds(
            np.concatenate([np.zeros(binaries + num_clusters), [1]]),
            np.concatenate([upper, np.full(num_clusters, 2.0), [1]]),
        ),
        constraints=constraints,
        options={"mip_rel_gap": relative_gap, "time_limit": time_limit},
    )
    if result.x is None:
        return None
    return np.asarray(result.x[:binaries].reshape(num_clusters, experts).argmax(0), dtype=np.int64)


def cluster_transitions(clusters: Layers, transitions: ArrayLike, num_clusters: int) -> NDArray[np.float64]:
    """[num_layers - 1, num_clusters, num_clusters]: the transitions between the clusters of neighbouring layers."""
    pairs = np.asarray(transitions, dtype=np.float64)
    layers, experts = clusters.shape
    if pairs.shape != (max(layers - 1, 0), experts, experts):
        raise ValueError(f"transitions: expected {[max(layers - 1, 0), experts, experts]}, got {list(pairs.shape)}")
    members = np.eye(num_clusters)[clusters]  # [layers, experts, clusters]
    summed: NDArray[np.float64] = np.einsum("lea,lef,lfb->lab", members[:-1], pairs, members[1:], optimize=True)
    return summed


def transition_cost(
    transitions: ArrayLike, placement: ExpertPlacement, seconds_per_byte: ArrayLike | None = None
) -> float:
    """The second program's objective for a placement without replicas: per pair of layers the costliest pair of ranks.

    Raises ValueError if the placement has replicas or shapes do not fit.
    """
    if placement.num_slots != placement.num_experts:
        raise ValueError(
            f"placement: expected {placement.num_experts} slots, none replicated, got {placement.num_slots}"
        )
    ranks = placement.log2phy[:, :, 0] * placement.num_ranks // placement.num_slots
    between = cluster_transitions(ranks, transitions, placement.num_ranks)
    costs = _check_costs(seconds_per_byte, placement.num_ranks)
    return _chain_cost(np.tile(np.arange(placement.num_ranks), (placement.num_layers, 1)), between, costs)


def assign_clusters(
    transitions: ArrayLike,
    seconds_per_byte: ArrayLike | None = None,
    *,
    relative_gap: float = 0.025,
    time_limit: float = 60.0,
    joint: bool = True,
) -> Layers:
    """The second program: [num_layers, num_clusters] int64, the rank of every cluster, one to one in each layer.

    Least ``sum over layers of max over pairs of ranks (transitions * seconds per byte)``.

    Args:
        transitions: [num_layers - 1, num_clusters, num_clusters], see :func:`cluster_transitions`.
        seconds_per_byte: [num_ranks, num_ranks], the reciprocal bandwidths; by default 1 between ranks and 0 on a rank.
        relative_gap: stop within this fraction of the optimum.
        time_limit: seconds for each layer, then for all of them; after that the best found counts.
        joint: solve all layers at once where it can help. False goes from layer to layer only, each optimal for the
            ones before: fast, and the optimum already if all ranks are equally far apart.

    Raises ImportError without scipy, ValueError for shapes that do not fit.
    """
    between = np.asarray(transitions, dtype=np.float64)
    if between.ndim != 3 or between.shape[1] != between.shape[2] or between.shape[1] == 0:
        raise ValueError(f"transitions: expected [num_layers - 1, clusters, clusters], got {list(between.shape)}")
    if not (np.isfinite(between).all() and (between >= 0).all()):
        raise ValueError("transitions: expected finite numbers that are not negative")
    _check_limits(relative_gap, time_limit)
    num_clusters = between.shape[1]
    costs = _check_costs(seconds_per_byte, num_clusters)
    chain = [np.arange(num_clusters)]
    for pairs in between:
        chain.append(_solve_next_layer(chain[-1], pairs, costs, relative_gap, time_limit))
    candidates = [np.tile(np.arange(num_clusters), (len(chain), 1)), np.array(chain)]
    known = min(_chain_cost(ranks, between, costs) for ranks in candidates)
    # Equally far apart, a pair of layers costs what its own matching of clusters costs, whatever the others do.
    equally_far = (costs == np.where(np.eye(num_clusters), costs[0, 0], costs[0, -1])).all()
    if joint and known > 0 and not equally_far:
        found = _solve_all_layers(between, costs, known, relative_gap, time_limit)
        candidates += [] if found is None else [found]
    return min(candidates, key=lambda ranks: _chain_cost(ranks, between, costs))


def _chain_cost(ranks: Layers, between: NDArray[np.float64], costs: NDArray[np.float64]) -> float:
    total = 0.0
    for (first, second), pairs in zip(pairwise(ranks), between, strict=True):
        total += float((pairs * costs[first[:, None], second[None, :]]).max())
    return total


def _solve_next_layer(
    before: NDArray[np.int64],
    pairs: NDArray[np.float64],
    costs: NDArray[np.float64],
    relative_gap: float,
    time_limit: float,
) -> NDArray[np.int64]:
    """A bottleneck assignment: variables y[cluster, rank] and the time t, the layer before being fixed."""
    scipy_optimize, sparse = _scipy("optimize"), _scipy("sparse")
    clusters = len(before)
    # worst[cluster, rank] if the cluster goes to the rank.
    worst = (pairs[:, :, None] * costs[before][:, None, :]).max(0)
    if not worst.any():
        return before
    worst = worst / worst.max()
    eye, ones = sparse.eye_array(clusters), np.ones((1, clusters))
    no_time, time = sparse.coo_array((clusters, 1)), np.full((clusters, 1), -1.0)
    by_cluster = sparse.hstack([sparse.block_diag([row[None, :] for row in worst]), time])
    by_rank = sparse.hstack([sparse.hstack([sparse.diags_array(row) for row in worst]), time])
    constraints = [
        scipy_optimize.LinearConstraint(sparse.hstack([sparse.kron(eye, ones), no_time]), 1, 1),
        scipy_optimize.LinearConstraint(sparse.hstack([sparse.kron(ones, eye), no_time]), 1, 1),
        scipy_optimize.LinearConstraint(by_cluster, -np.inf, 0),
        scipy_optimize.LinearConstraint(by_rank, -np.inf, 0),
    ]
    binaries = clusters * clusters
    result = scipy_optimize.milp(
        np.concatenate([np.zeros(binaries), [1]]),
        integrality=np.concatenate([np.ones(binaries), [0]]),
        bounds=scipy_optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": relative_gap, "time_limit": time_limit},
    )
    return before if result.x is None else result.x[:binaries].reshape(clusters, clusters).argmax(1)


def _solve_all_layers(
    between: NDArray[np.float64], costs: NDArray[np.float64], known: float, relative_gap: float, time_limit: float
) -> Layers | None:
    """Variables: y[layer, cluster, rank] and the time t[layer]. Only what beats the ``known`` cost is of interest.

    The products y[l, c1, g1] * y[l + 1, c2, g2] need no variables of their own: whichever cluster c2 is on rank g2,
    t[l] >= sum over c2 of w[c1, g1, c2, g2] * y[l + 1, c2, g2] - (1 - y[l, c1, g1]) * max over c2 of w, and the same
    from the other side.
    """
    scipy_optimize, sparse = _scipy("optimize"), _scipy("sparse")
    steps, clusters = between.shape[:2]
    layers, square = steps + 1, clusters**2
    variables = layers * square + steps
    blocks, limits = [], []
    for step, pairs in enumerate(between / known):
        weights = pairs[:, None, :, None] * costs[None, :, None, :]  # [c1, g1, c2, g2]
        for one, other, weight in ((step, step + 1, weights), (step + 1, step, weights.transpose(2, 3, 0, 1))):
            # A row for every (cluster and rank here, rank there).
            largest = weight.max(2).ravel()
            here, there = np.divmod(np.arange(len(largest)), clusters)
            rows = np.arange(len(largest))
            values = [largest, np.full(len(largest), -1.0)]
            columns = [one * square + here, np.full(len(largest), layers * square + step)]
            for cluster in range(clusters):
                values.append(weight[:, :, cluster, :].ravel())
                columns.append(other * square + cluster * clusters + there)
            blocks.append(sparse.coo_array(
                (np.concatenate(values), (np.tile(rows, clusters + 2), np.concatenate(columns))),
                shape=(len(largest), variables),
            ))  # fmt: skip
            limits.append(largest)
    eye, one_each = sparse.eye_array(clusters), np.ones((1, clusters))
    rest = sparse.coo_array((layers * clusters, steps))
    total_time = np.concatenate([np.zeros(layers * square), np.ones(steps)])
    result = scipy_optimize.milp(
        total_time,
        integrality=np.concatenate([np.ones(layers * square), np.zeros(steps)]),
        bounds=scipy_optimize.Bounds(0, 1),
        constraints=[
            *(
                scipy_optimize.LinearConstraint(
                    sparse.hstack([sparse.kron(sparse.eye_array(layers), once), rest]), 1, 1
                )
                for once in (sparse.kron(eye, one_each), sparse.kron(one_each, eye))
            ),
            scipy_optimize.LinearConstraint(sparse.vstack(blocks), -np.inf, np.concatenate(limits)),
            scipy_optimize.LinearConstraint(total_time[None, :], -np.inf, 1),
            *_order_alike(costs, variables),
        ],
        options={"mip_rel_gap": relative_gap, "time_limit": time_limit},
    )
    if result.x is None:
        return None
    return np.asarray(result.x[: layers * square].reshape(layers, clusters, clusters).argmax(2), dtype=np.int64)


def _order_alike(costs: NDArray[np.float64], variables: int) -> list[Any]:
    """Ranks whose exchange changes no cost take the first layer's clusters in ascending order."""
    scipy_optimize, ranks = _scipy("optimize"), len(costs)
    constraints = []
    for first, second in combinations(range(ranks), 2):
        exchange = np.arange(ranks)
        exchange[[first, second]] = second, first
        if (costs[np.ix_(exchange, exchange)] == costs).all():
            row = np.zeros((ranks, ranks))  # y[0, cluster, rank]
            row[:, first], row[:, second] = -np.arange(ranks), np.arange(ranks)
            row = np.pad(row.ravel(), (0, variables - row.size))
            constraints.append(scipy_optimize.LinearConstraint(row, 1, np.inf))
    return constraints


def _check_costs(seconds_per_byte: ArrayLike | None, num_ranks: int) -> NDArray[np.float64]:
    if seconds_per_byte is None:
        return 1 - np.eye(num_ranks)
    costs = np.asarray(seconds_per_byte, dtype=np.float64)
    if costs.shape != (num_ranks, num_ranks) or not (np.isfinite(costs).all() and (costs >= 0).all()):
        raise ValueError(
            f"seconds_per_byte: expected finite numbers >= 0 [{num_ranks}, {num_ranks}], got {list(costs.shape)}"
        )
    return costs


def _check_limits(relative_gap: float, time_limit: float) -> None:
    if not (relative_gap >= 0 and time_limit > 0 and math.isfinite(time_limit)):
        raise ValueError(
            f"relative_gap, time_limit: expected at least 0 and more than 0, got {relative_gap} and {time_limit}"
        )


def _scipy(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise ImportError("MoETuner's integer programs need scipy; run: pip install 'moe_ext[placement]'") from error
