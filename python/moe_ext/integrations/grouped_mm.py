"""``torch.nn.functional.grouped_mm`` on moe_ext's grouped GEMM: the same call, the same results.

    from moe_ext.integrations.grouped_mm import grouped_mm
    rows = grouped_mm(hidden[order], weight.transpose(1, 2), offs=ends)

Beyond torch's: float32, float16 and float64 next to bfloat16 on every device that has the ops, and zeros, not
leftovers, in rows past the last offset. Strides may be any; a transposed weight is multiplied where it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ext.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One matrix product per group, by the shapes of the operands, as ``torch.nn.functional.grouped_mm`` has it.

    Args:
        mat_a, mat_b: both of one dtype, on one device; E groups.

            - [M, K] and [E, K, N]: rows ``offs[e - 1] : offs[e]`` of ``mat_a`` times ``mat_b[e]``, to [M, N].
            - [E, M, K] and [K, N]: ``mat_a[e]`` times columns ``offs[e - 1] : offs[e]`` of ``mat_b``, to [M, N].
            - [M, K] and [K, N]: columns of ``mat_a`` times the same rows of ``mat_b``, to [E, M, N] (the gradient of
              a weight).

        offs: [E] int32, the end of each group; not decreasing, at most the size of the axis that is cut.
        bias: None; torch has no kernel with a bias either.
        out_dtype: None, the dtype of the operands, or for [M, K] and [K, N] also float32.

    Returns:
        The products, in the dtype of the operands or ``out_dtype``. Rows of no group are zero. Differentiable in
        ``mat_a`` and ``mat_b``.

    Raises:
        ValueError: shapes, ``offs``, ``bias`` or ``out_dtype`` are not those above; the message names the argument.
        RuntimeError: from :func:`moe_ext.grouped_gemm` or :func:`moe_ext.grouped_gemm_wgrad`.
    """
    if bias is not None:
        raise ValueError("bias: expected None, got a tensor; moe_ext.grouped_gemm takes a bias [num_experts, N]")
    axes = (mat_a.dim(), mat_b.dim())
    if axes not in ((2, 3), (3, 2), (2, 2)):
        raise ValueError(
            f"mat_a, mat_b: expected 2 and 3, 3 and 2, or 2 and 2 axes, got {list(mat_a.shape)} and "
            f"{list(mat_b.shape)}; two operands of 3 axes are torch.bmm"
        )
    if offs is None or offs.dim() != 1 or offs.dtype != torch.int32:
        found = "None" if offs is None else f"{offs.dtype} {list(offs.shape)}"
        raise ValueError(f"offs: expected torch.int32 [num_groups], got {found}")
    groups = next((x.shape[0] for x in (mat_a, mat_b) if x.dim() == 3), offs.shape[0])
    if groups != offs.shape[0]:
        raise ValueError(f"offs: expected {groups} ends, one for each matrix, got {offs.shape[0]}")
    allowed = (None, mat_a.dtype) if axes != (2, 2) else (None, mat_a.dtype, torch.float32)
    if out_dtype not in allowed:
        raise ValueError(f"out_dtype: expected one of {allowed}, got {out_dtype}")
    offsets = F.pad(offs, (1, 0))
    if axes == (2, 2):
        return grouped_gemm_wgrad(mat_a.transpose(0, 1), mat_b, offsets, weight_layout="ekn", out_dtype=out_dtype)
    if axes == (3, 2):
        return _rows_times_weights(mat_b.transpose(0, 1), mat_a.transpose(1, 2), offsets).transpose(0, 1)
    return _rows_times_weights(mat_a, mat_b, offsets)


def _rows_times_weights(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    # A transposed view names its layout, so that no device has to copy it.
    if weight.stride(1) == 1 and weight.stride(2) != 1:
        return grouped_gemm(rows, weight.transpose(1, 2), offsets, weight_layout="enk")
    return grouped_gemm(rows, weight, offsets, weight_layout="ekn")
