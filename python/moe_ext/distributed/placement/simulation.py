"""What a placement would cost on a routing trace: counted rows and bytes, and simulated times of a stated cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_ext import _host
from moe_ext.distributed.placement.layout import ExpertPlacement
from moe_ext.distributed.traces import RoutingTrace

AllToAll = Literal["per_slot", "per_rank", "per_node"]
_KINDS = ("per_slot", "per_rank", "per_node")


@dataclass(frozen=True)
class Link:
    """The alpha-beta model: a rank that sends m messages of n bytes in all takes m * alpha + n / bandwidth."""

    seconds_per_message: float
    bytes_per_second: float


@dataclass(frozen=True)
class Cluster:
    """The machine of a simulation. Nothing is assumed: measure these figures on yours."""

    num_ranks: int
    ranks_per_node: int
    intra: Link
    """Between ranks of a node."""
    inter: Link
    """Between nodes, for each rank."""
    seconds_per_row: float
    """One row through one expert."""
    seconds_per_expert: float = 0.0
    """Once for every expert with rows, such as reading its weights."""

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node: expected a divisor of num_ranks {self.num_ranks}, got {self.ranks_per_node}"
            )
        for name, link in (("intra", self.intra), ("inter", self.inter)):
            if not (link.seconds_per_message >= 0 and link.bytes_per_second > 0):
                raise ValueError(f"{name}: expected latency >= 0 and bandwidth > 0, got {link}")
        if not (self.seconds_per_row >= 0 and self.seconds_per_expert >= 0):
            raise ValueError(
                "seconds_per_row, seconds_per_expert: expected at least 0, "
                f"got {self.seconds_per_row} and {self.seconds_per_expert}"
            )


@dataclass(frozen=True)
class SimulatedStep:
    """One forward pass. Rows and bytes are counted on the trace; every time is simulated."""

    rows: NDArray[np.int64]
    """[num_layers, num_ranks]: slots that a rank computes."""
    active_experts: NDArray[np.int64]
    """[num_layers, num_ranks]: physical experts with rows."""
    intra_node_bytes: NDArray[np.float64]
    """[num_layers, num_ranks]: what a rank sends inside its node, dispatch and combine."""
    inter_node_bytes: NDArray[np.float64]
    """[num_layers, num_ranks]: what a rank sends to other nodes, dispatch and combine."""
    compute_seconds: NDArray[np.float64]
    """[num_layers]: simulated, of the slowest rank."""
    all_to_all_seconds: NDArray[np.float64]
    """[num_layers]: simulated, dispatch and combine, of the slowest rank."""

    @property
    def step_seconds(self) -> float:
        """Simulated: all layers, nothing overlapped."""
        return float(self.compute_seconds.sum() + self.all_to_all_seconds.sum())

    @property
    def balancedness(self) -> NDArray[np.float64]:
        """[num_layers]: mean over maximum of the rows per rank, 1 without rows."""
        hottest = self.rows.max(1)
        ratio: NDArray[np.float64] = np.divide(self.rows.mean(1), hottest, out=np.ones(len(hottest)), where=hottest > 0)
        return ratio

    def summary(self) -> dict[str, float]:
        """The figures of a report; names say which of them are simulated."""
        return {
            "balancedness": float(self.balancedness.mean()) if len(self.rows) else 1.0,
            "intra_node_bytes": float(self.intra_node_bytes.sum()),
            "inter_node_bytes": float(self.inter_node_bytes.sum()),
            "simulated_compute_seconds": float(self.compute_seconds.sum()),
            "simulated_all_to_all_seconds": float(self.all_to_all_seconds.sum()),
            "simulated_step_seconds": self.step_seconds,
        }


def simulate_step(
    trace: RoutingTrace,
    placement: ExpertPlacement,
    cluster: Cluster,
    *,
    hidden_size: int,
    dispatch_bytes_per_element: float = 2,
    combine_bytes_per_element: float = 2,
    all_to_all: AllToAll = "per_rank",
    replica_choice: Literal["spread", "nearest"] = "spread",
    tokens_follow: bool = False,
) -> SimulatedStep:
    """The tokens of ``trace`` as one batch, split evenly over the ranks in order, under ``placement``.

    Judge a placement on a trace that it was not made from (:meth:`RoutingTrace.split`).

    Args:
        cluster: must have the placement's ranks.
        dispatch_bytes_per_element, combine_bytes_per_element: of a hidden row on its way out and back.
        all_to_all: ``per_slot`` sends a row for each of a token's experts; ``per_rank`` one for each rank that holds
            any; ``per_node`` one for each node, to the rank there with the sender's place, which hands it on. The
            latter two carry 8 bytes more per expert slot (ids, weights).
        replica_choice: tokens take the replicas of an expert in turn (``spread``), or those on their own rank, else on
            their own node, if there are any (``nearest``).
        tokens_follow: a token goes on to the next layer from the rank of its first expert (ExFlow, MoETuner), instead
            of from the rank where it started.

    The time of a layer is dispatch, compute and combine, one after another. A link takes messages * alpha +
    max(bytes out, bytes in) / bandwidth on the slowest rank, with a message to every peer; the two links work side by
    side, for ``per_node`` one after the other.

    Raises ValueError for shapes that do not fit.
    """
    if all_to_all not in _KINDS:
        raise ValueError(f"all_to_all: expected one of {', '.join(_KINDS)}, got {all_to_all!r}")
    if replica_choice not in ("spread", "nearest"):
        raise ValueError(f"replica_choice: expected spread or nearest, got {replica_choice!r}")
    if cluster.num_ranks != placement.num_ranks:
        raise ValueError(f"placement: expected {cluster.num_ranks} ranks as the cluster has, got {placement.num_ranks}")
    if trace.num_experts != placement.num_experts:
        raise ValueError(f"placement: expected {trace.num_experts} experts, got {placement.num_experts}")
    rows, active_experts, copies = _host.count_traffic(
        trace.topk_ids,
        placement.phy2log,
        placement.num_experts,
        placement.num_ranks,
        cluster.ranks_per_node,
        replica_choice == "nearest",
        tokens_follow,
    )
    sent = copies[:, _KINDS.index(all_to_all)]  # [layers, (intra, inter), (out, in), ranks]
    metadata = 0 if all_to_all == "per_slot" else 8 * trace.topk_ids.shape[2]
    row_bytes = (hidden_size * dispatch_bytes_per_element + metadata, hidden_size * combine_bytes_per_element)
    # What went out at dispatch comes in at combine.
    sent_bytes = sent[:, :, 0] * row_bytes[0] + sent[:, :, 1] * row_bytes[1]
    nodes = cluster.num_ranks // cluster.ranks_per_node
    peers = nodes - 1 if all_to_all == "per_node" else cluster.num_ranks - cluster.ranks_per_node
    crossings = sent.max(2) * sum(row_bytes)
    intra = _link_seconds(cluster.intra, cluster.ranks_per_node - 1, crossings[:, 0])
    inter = _link_seconds(cluster.inter, peers, crossings[:, 1])
    exchange = intra.max(1) + inter.max(1) if all_to_all == "per_node" else np.maximum(intra, inter).max(1)
    compute = rows * cluster.seconds_per_row + active_experts * cluster.seconds_per_expert
    return SimulatedStep(rows, active_experts, sent_bytes[:, 0], sent_bytes[:, 1], compute.max(1), exchange)


def _link_seconds(link: Link, peers: int, num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of dispatch and combine together: a message to every peer each time."""
    return 2 * peers * link.seconds_per_message + num_bytes / link.bytes_per_second
