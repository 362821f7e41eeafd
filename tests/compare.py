"""How an op is held against its reference twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_float64(value: Any) -> Any:
    """Floating tensors on the CPU in float64, detached; everything else as it is (tensors moved to the CPU)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    return value


def widened(value: Any) -> Any:
    """Floating tensors in float64 where they are, beside the plan and the maps that a case holds; else as it is."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN on either side gives NaN, which passes no comparison."""
    actual, expected = to_float64(actual).double(), to_float64(expected).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    norm = expected.norm().item()
    return ((actual - expected).norm() / norm).item() if norm > 0 else actual.norm().item()


def element_error(actual: Tensor, expected: Tensor) -> float:
    """The largest of an element's error over its size and the root mean square of all: one wrong among many shows."""
    actual, expected = to_float64(actual).double(), to_float64(expected).double()
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs() + expected.square().mean().sqrt()
    return ((actual - expected).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max().item()


# What fp32 accumulation may cost where plain torch happens to be exact.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(function: Callable[..., Any], args: Sequence[Any], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """Outputs of ``function(*args)``, then, if ``grads`` are given, the gradients of every floating argument."""
    args = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(grads is not None)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    outputs = function(*args)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if grads is None:
        return outputs
    differentiable = [o for o in outputs if o.requires_grad]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(
        differentiable, inputs, [g.to(o) for g, o in zip(grads, differentiable, strict=True)], allow_unused=True
    )
    return outputs + [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def assert_matches_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    grads: Sequence[Tensor] | None = None,
) -> None:
    """``op`` against ``reference`` in float64, values and (with ``grads``) gradients.

    Integer and bool outputs must be equal. The error of a floating output may be twice that of the reference run in
    the dtype of the inputs, or FLOOR of that dtype, whichever is larger; so may, eight times over, that of each element.
    """
    actual = run(op, args, grads)
    wide = run(reference, [widened(a) for a in args], None if grads is None else [widened(g) for g in grads])
    plain = run(reference, args, grads)
    lowest = max((FLOOR[a.dtype], str(a.dtype)) for a in args if isinstance(a, Tensor) and a.is_floating_point())[0]
    assert len(actual) == len(wide) == len(plain)
    for index, (got, exact, at_dtype) in enumerate(zip(actual, wide, plain, strict=True)):
        if not got.is_floating_point():
            torch.testing.assert_close(got.cpu(), exact.cpu(), rtol=0, atol=0, check_dtype=False)
            continue
        error, allowed = relative_error(got, exact), max(2 * relative_error(at_dtype, exact), lowest)
        assert error <= allowed, f"result {index}: relative error {error:.3g}, allowed {allowed:.3g}"
        worst = element_error(got, exact)
        assert worst <= 8 * allowed, f"result {index}: an element is off by {worst:.3g}, allowed {8 * allowed:.3g}"


def assert_deterministic(op: Callable[..., Any], args: Sequence[Any], grads: Sequence[Tensor] | None = None) -> None:
    """Two runs are bitwise equal."""
    for first, second in zip(run(op, args, grads), run(op, args, grads), strict=True):
        assert torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
