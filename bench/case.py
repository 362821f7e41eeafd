"""What one row of the benchmark is."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .machine import spend_flops
from .routing import make_topk_ids
from .shapes import LayerShape

# How far a peer's result may lie from ours, by dtype: it must compute the same thing to stand in the table.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Case:
    """One measurement: ours against its peers on the same inputs.

    ``ours`` and every peer take nothing and return a tensor or a tuple of tensors. ``flops`` and ``bytes`` are the
    least work and memory traffic of the operation, ``read_bytes`` that traffic where nearly all of it is reading;
    ``ceilings`` are not peers but limits (a dense product of equal FLOPs, a copy of equal bytes) and are not checked.
    """

    op: str
    table: str
    name: str
    dtype: torch.dtype
    routing: str
    direction: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    ceilings: dict[str, Callable[[], Any]] = field(default_factory=dict)
    skipped_peers: dict[str, str] = field(default_factory=dict)
    differing_peers: list[str] = field(default_factory=list)  # of the skipped: who is wrong was not looked into
    flops: float = 0.0
    bytes: float = 0.0
    read_bytes: float = 0.0
    tolerance: float | None = None
    threads: int | None = None  # None: all of them

    def check_peers(self) -> dict[str, float]:
        """Relative difference of each peer's result from ours.

        A peer that raises (another version of its library, no memory) or computes something else is none:
        ``skipped_peers`` says why. Where all that ran differ it is ours that is wrong: raises AssertionError.
        """
        expected = [_compared(x) for x in _tensors(self.ours())]
        allowed = self.tolerance if self.tolerance is not None else TOLERANCE[self.dtype]
        agreeing, differing = {}, {}
        for name, peer in list(self.peers.items()):
            try:
                found = [_compared(x) for x in _tensors(peer())]
            except Exception as error:
                self._skip(name, f"raised {first_line(error)}")
                continue
            worst = _worst_difference(found, expected)
            (agreeing if worst <= allowed else differing)[name] = worst
        words = {name: f"differs from ours by {worst:.3g}, allowed {allowed:.3g}" for name, worst in differing.items()}
        if differing and not agreeing:
            told = "; ".join(f"{name} {text}" for name, text in words.items())
            raise AssertionError(f"{self.op} {self.name} {self.direction}: {told}, and no peer agrees")
        for name, text in words.items():
            self._skip(name, text)
        self.differing_peers = list(differing)
        return agreeing

    def _skip(self, name: str, why: str) -> None:
        del self.peers[name]
        self.skipped_peers[name] = why


Cases = Iterator[Case]


@dataclass
class Context:
    """What a bench module needs to know to make its cases."""

    device: str
    profile: str  # cpu, gpu or quick
    dtypes: list[torch.dtype]
    tables: set[str] = field(default_factory=set)
    full: bool = False  # the longer list of layers
    shapes: list[str] | None = None  # None: all
    traces: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[tuple[Any, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # a line for each case that could not be made or measured

    def attempt(self, label: str, cases: Cases) -> Cases:
        """The cases up to one whose making raises (no memory, a peer's library): those after these go on."""
        try:
            yield from cases
        except Exception as error:
            self.errors.append(f"{label}: while a case was made: {first_line(error)[:500]}")
            print(self.errors[-1], file=sys.stderr, flush=True)

    def wanted(self, layers: list[LayerShape]) -> list[LayerShape]:
        return [layer for layer in layers if self.shapes is None or layer.name in self.shapes]

    def rows(self, *sizes: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        if len(sizes) < 3:
            return torch.randn(*sizes, generator=generator, device=self.device).mul_(scale).to(dtype)
        rows = torch.empty(*sizes, dtype=dtype, device=self.device)
        for part in rows:  # weights in float32 beside those in bfloat16 would not fit a GPU
            part.copy_(torch.randn(*sizes[1:], generator=generator, device=self.device).mul_(scale))
        return rows

    def expert_weights(self, shape: LayerShape, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """gate_up [E, 2I, H] and down [E, H, I], for gpt-oss [E, H, 2I] and [E, I, H] with a bias of each; kept until
        a layer of another size or dtype asks."""
        hidden_size, width, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
        key = (num_experts, hidden_size, width, dtype, shape.gpt_oss)
        if key not in self.weights:
            self.weights.clear()
            up, down = (2 * width, hidden_size), (hidden_size, width)
            if shape.gpt_oss:
                up, down = up[::-1], down[::-1]
            self.weights[key] = (
                self.rows(num_experts, *up, dtype=dtype, scale=hidden_size**-0.5, seed=1),
                self.rows(num_experts, *down, dtype=dtype, scale=width**-0.5, seed=2),
            )
            if shape.gpt_oss:
                self.weights[key] += (
                    self.rows(num_experts, 2 * width, dtype=dtype, seed=5),
                    self.rows(num_experts, hidden_size, dtype=dtype, seed=6),
                )
        return self.weights[key]

    def topk_ids(self, shape: LayerShape, routing: str) -> Tensor:
        """Ids of a made-up routing, or, for "real", those that a trained router chose."""
        if routing != "real":
            return make_topk_ids(shape.num_tokens, shape.num_experts, shape.topk, routing, self.device)
        trace = self.traces["ids"]
        repeats = -(-shape.num_tokens // trace.shape[0])
        return trace.repeat(repeats, 1)[: shape.num_tokens].to(self.device)


def with_peak(
    context: Context, ceilings: dict[str, Callable[[], Any]], flops: float, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """The ceilings of a case and, on a CPU, its FLOPs from register to register: what no product goes below."""
    if context.device == "cpu":
        ceilings["peak"] = lambda: spend_flops(flops, dtype)
    return ceilings


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for item in result for x in _tensors(item)]


def _compared(result: Tensor) -> Tensor:
    """What is kept of a result for the comparison: of gradients of many gigabytes every 16th expert."""
    return result[::16].clone() if result.dim() == 3 and result.numel() > 2**30 else result


def _worst_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Infinite where they are not as many, not of the same sizes, or not numbers."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return math.inf
    differences = [relative_difference(a, b) for a, b in zip(found, expected, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences, default=0.0)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def relative_difference(a: Tensor, b: Tensor) -> float:
    # float32 is enough for a relative difference of 1e-4, and weight gradients are too many for float64 copies.
    norm, a, b = torch.linalg.vector_norm, a.detach().float(), b.detach().float()
    scale = norm(b).item()
    return (norm(a - b) / scale).item() if scale else norm(a).item()
