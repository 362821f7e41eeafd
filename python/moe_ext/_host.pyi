from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def sm90_tiles() -> list[dict[str, Any]]: ...
def choose_sm90_tile(groups: int, rows: int, columns: int, multiprocessors: int) -> str: ...
def balance_experts(
    loads: NDArray[Any], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> NDArray[np.int64]: ...
def rebalance_experts(
    loads: NDArray[Any], phy2log: NDArray[Any], num_nodes: int, num_ranks: int, max_moves: int
) -> NDArray[np.int64]: ...
def placement_maps(phy2log: NDArray[Any], num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def count_traffic(
    topk_ids: NDArray[Any],
    phy2log: NDArray[Any],
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    nearest: bool,
    follow: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def simulate_expert_cache(
    needed: NDArray[np.bool_], predicted: NDArray[np.bool_], capacity: int, policy: str, prefetch_per_layer: int
) -> tuple[int, int, int]: ...
