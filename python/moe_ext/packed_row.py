"""The row of bytes in which a token travels: what csrc/all_to_all/packed_row.h is, in Python."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Payload = Literal["native", "fp8"]
ROW_ALIGNMENT = 16
SCALE_BLOCK = 128


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ROW_ALIGNMENT) * ROW_ALIGNMENT


class PackedRow(NamedTuple):
    """Where the parts of a row lie: payload, weights, scales, local expert ids, zeros up to a multiple of 16 bytes."""

    payload_bytes: int
    """Bytes of the hidden state, with the zeros up to a multiple of 16."""
    weights_at: int
    scales_at: int
    """One fp32 scale for every 128 elements; none unless the payload is fp8."""
    ids_at: int
    row_bytes: int
    num_scales: int
    weight_dtype: torch.dtype | None
    """None: no weights travel."""

    @staticmethod
    def of(hidden_size: int, topk: int, dtype: torch.dtype, payload: str, weighted: bool) -> PackedRow:
        """The layout for rows of ``dtype``; ``topk`` ids, and as many weights if ``weighted``."""
        if payload not in ("native", "fp8"):
            raise RuntimeError(f"payload: expected native or fp8, got {payload}")
        quantised = payload == "fp8"
        num_scales = -(-hidden_size // SCALE_BLOCK) if quantised else 0
        weight_dtype = None if not weighted else torch.float64 if dtype == torch.float64 else torch.float32
        weights_at = _aligned(hidden_size * (1 if quantised else dtype.itemsize))
        scales_at = weights_at + (topk * weight_dtype.itemsize if weight_dtype else 0)
        ids_at = scales_at + 4 * num_scales
        return PackedRow(
            weights_at, weights_at, scales_at, ids_at, _aligned(ids_at + 4 * topk), num_scales, weight_dtype
        )
