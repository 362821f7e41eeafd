"""``gmm`` of the package grouped_gemm, the product under MegaBlocks' dropless layers and Megatron's GroupedMLP.

    from moe_ext.integrations import megablocks as gg
    output = gg.gmm(rows, weight, tokens_per_expert, trans_b=True)

Megatron and MegaBlocks reach it as ``grouped_gemm.ops.gmm``; this module stands in the place of ``grouped_gemm.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ext.ops.grouped_gemm import grouped_gemm


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiply consecutive rows of ``a`` with one matrix of ``b`` each.

    Args:
        a: [num_rows, K], float32, bfloat16 or float16 (float64 on the CPU).
        b: [num_experts, K, N], or [num_experts, N, K] with ``trans_b``, in the dtype of ``a``.
        batch_sizes: [num_experts] int64 or int32, rows of each expert, none negative; on the CPU, as grouped_gemm
            wants it, or on the device of ``a``, where it is read without a host sync. Rows beyond their sum give zeros.
        trans_b: whether the matrices of ``b`` are transposed.

    Returns:
        [num_rows, N] in the dtype of ``a``. Differentiable in ``a`` and ``b``.

    Raises:
        ValueError: ``batch_sizes`` is not a vector of integers, one for each matrix of ``b``.
        RuntimeError: from :func:`moe_ext.grouped_gemm`.
    """
    if batch_sizes.dtype not in (torch.int32, torch.int64) or batch_sizes.shape != b.shape[:1]:
        raise ValueError(
            f"batch_sizes: expected torch.int64 or torch.int32 [{b.shape[0]}], got {batch_sizes.dtype} "
            f"{list(batch_sizes.shape)}"
        )
    ends = batch_sizes.to(a.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    return grouped_gemm(a, b, F.pad(ends, (1, 0)), weight_layout="enk" if trans_b else "ekn")
