"""Autograd formulas of the ops, in every way that torch differentiates in reverse.

``torch.library.register_autograd`` takes the same formulas, but its kernel refuses ``torch.func.grad``, and lets the
tangents of ``torch.func.jvp`` fall away without a word: its result is then a zero that looks like a derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

# Registrations end with the object that made them.
_fragment = torch.library.Library("moe_ext", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autograd(name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """Give the op ``moe_ext::...`` its formula; arguments as in :func:`torch.library.register_autograd`.

    Works under autograd, ``torch.func.grad``, ``vjp``, ``jacrev`` and ``vmap`` of these. Forward mode raises
    NotImplementedError.
    """
    op = getattr(torch.ops.moe_ext, name.removeprefix("moe_ext::")).default

    def below_autograd(keyset: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *arguments_and_keyset: Any) -> Any:
        *arguments, keyset = arguments_and_keyset
        output = below_autograd(keyset, tuple(arguments))
        setup_context(ctx=ctx, inputs=tuple(arguments), output=output)
        return output

    def backward_with_keyset(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        results = backward(ctx, *grads)
        return (*results, None) if isinstance(results, tuple) else (results, None)

    # Inside a transform of torch.func this kernel already stands at that transform's level: a Function of one level is
    # what is wanted; torch.autograd.Function would start over at the outermost one.
    function = type(
        f"{op._opname}_autograd",
        (torch.autograd.function._SingleLevelFunction,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keyset)},
    )

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            with enable_single_level_autograd_function():
                return function.apply(*arguments, keyset)  # type: ignore[attr-defined]
        return below_autograd(keyset, arguments)

    _fragment.impl(op._opname, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def call(op: Callable[..., Any], *arguments: Any) -> Any:
    """The op. Without gradients and transforms not by way of its autograd kernel, which is Python and takes time."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments))
    ):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _refuse_tangents(name: str, tensors: list[Tensor]) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{name}: expected no tangents, got a dual tensor: forward-mode differentiation (torch.func.jvp, "
            "torch.autograd.forward_ad) is not implemented; use torch.func.vjp, grad or jacrev"
        )
