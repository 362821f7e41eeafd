"""Which rank holds which expert, and how many times: physical experts in rank order, each a copy of a logical one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe_ext.ops.all_to_all import even_rank_expert_offsets


class ExpertMap:
    """Physical experts and the logical ones they are copies of.

    Args:
        physical_to_logical: the logical expert of each physical one; rank r holds the next ``experts_per_rank[r]`` of
            them, one rank after the other. Every logical expert occurs at least once.
        experts_per_rank: how many physical experts each rank holds; zero is allowed.
        device: of the tables.

    Raises:
        ValueError: a logical expert is missing, or the sizes do not add up; the message names it.
    """

    def __init__(
        self,
        physical_to_logical: Sequence[int],
        experts_per_rank: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        if sum(experts_per_rank) != len(physical_to_logical) or min(experts_per_rank, default=0) < 0:
            raise ValueError(
                f"experts_per_rank: expected sizes >= 0 that sum to {len(physical_to_logical)}, the length of "
                f"physical_to_logical, got {list(experts_per_rank)}"
            )
        self.physical_to_logical = list(physical_to_logical)
        self.experts_per_rank = list(experts_per_rank)
        self.num_logical = max(physical_to_logical, default=-1) + 1
        copies: list[list[int]] = [[] for _ in range(self.num_logical)]
        for physical, logical in enumerate(physical_to_logical):
            if logical < 0:
                raise ValueError(f"physical_to_logical: expected ids >= 0, got {logical} at {physical}")
            copies[logical].append(physical)
        if missing := [logical for logical, places in enumerate(copies) if not places]:
            raise ValueError(f"physical_to_logical: expected every logical expert at least once, {missing} are missing")
        self.copies = copies
        widest = max(map(len, copies), default=1)
        self._offsets = [0, *accumulate(experts_per_rank)]
        self.rank_expert_offsets = torch.tensor(self._offsets, dtype=torch.int32, device=device)
        self.replicated = [logical for logical, places in enumerate(copies) if len(places) > 1]
        self._places = torch.tensor(
            [places + places[:1] * (widest - len(places)) for places in copies], dtype=torch.int32, device=device
        ).view(self.num_logical, widest)
        self._num_copies = torch.tensor([len(places) for places in copies], dtype=torch.int32, device=device)

    @staticmethod
    def even(num_experts: int, num_ranks: int, device: torch.device | str | None = None) -> ExpertMap:
        """Consecutive experts, no copies, as even as can be."""
        sizes = even_rank_expert_offsets(num_experts, num_ranks).diff().tolist()
        return ExpertMap(range(num_experts), sizes, device)

    @property
    def num_ranks(self) -> int:
        return len(self.experts_per_rank)

    def to(self, device: torch.device | str) -> ExpertMap:
        """The same map with its tables on ``device``; itself if they are there."""
        if self.rank_expert_offsets.device == torch.device(device):
            return self
        return ExpertMap(self.physical_to_logical, self.experts_per_rank, device)

    def local_experts(self, rank: int) -> list[int]:
        """The logical experts whose copies ``rank`` holds, in the order of its weights."""
        return self.physical_to_logical[self._offsets[rank] : self._offsets[rank + 1]]

    def physical_ids(self, topk_ids: Tensor, first_token: int = 0) -> Tensor:
        """Logical ids [num_tokens, topk] -> physical ids, int32. On the device, without a sync.

        Token t takes copy ``(first_token + t) % copies`` of each of its experts: the same tokens, the same copies. An
        id outside [0, num_logical) becomes -1, "not here".
        """
        if not self.replicated and self.physical_to_logical == list(range(self.num_logical)):
            return topk_ids.int()
        here = (topk_ids >= 0) & (topk_ids < self.num_logical)
        logical = torch.where(here, topk_ids, 0).long()
        token = torch.arange(first_token, first_token + topk_ids.shape[0], device=topk_ids.device)[:, None]
        copy = token % self._num_copies[logical]
        return torch.where(here, self._places[logical, copy], -1)
