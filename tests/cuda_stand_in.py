"""torch.cuda without a GPU: tests/gpu and the benchmark's CUDA paths run on the CPU, so that a mistake in their Python
is found before a GPU is.

Kernels are those of the CPU (or, with MOE_EXT_LIBRARY, the emulated ones). Streams and events order nothing. A graph
is a tape of the ops that ran while it was captured, and a replay runs them again, on the same tensors: what was
computed in Python meanwhile is not repeated, as on a GPU. Ops that would wait for the device raise while a graph is
captured and where ``set_sync_debug_mode`` says "error"; copies between host and device cannot be told from others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "stand-in for a GPU"
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal"}


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    name = func.name().split("::")[1].split(".")[0]
    if name in ("index", "index_put", "index_put_"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in _WAITING


class _Watch(TorchDispatchMode):
    """Refuses what waits for the device; with a tape, writes down the rest."""

    def __init__(self, message: str, tape: list[tuple[Any, ...]] | None = None) -> None:
        super().__init__()
        self.message, self.tape = message, tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            raise RuntimeError(f"{self.message}: {func}")
        result = func(*args, **(kwargs or {}))
        if self.tape is not None:
            self.tape.append((func, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self) -> None:
        self.tape: list[tuple[Any, ...]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.tape:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    with _Watch("operation not permitted when stream is capturing", graph.tape):
        yield


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


class _SyncDebugMode:
    def __init__(self) -> None:
        self.watch: _Watch | None = None

    def __call__(self, mode: str) -> None:
        if self.watch:
            self.watch.__exit__(None, None, None)
            self.watch = None
        if mode == "error":
            self.watch = _Watch("called a synchronizing CUDA operation")
            self.watch.__enter__()


class _OnCpu(TorchFunctionMode):
    """Whoever asks for cuda gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def redirect(value: Any) -> Any:
            is_device = isinstance(value, (str, torch.device))
            return "cpu" if is_device and str(value).startswith("cuda") else value

        return func(*map(redirect, args), **{name: redirect(value) for name, value in (kwargs or {}).items()})


class _GeneratorOnCpu(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _GeneratorOnCpu:
        return super().__new__(cls)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins into torch.cuda. Devices stay what they are: tensors must be made on the CPU."""
    properties = SimpleNamespace(name=NAME, total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
    replacements: dict[str, Any] = {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": _graph, "stream": lambda _: nullcontext(),
        "current_stream": Stream, "set_sync_debug_mode": _SyncDebugMode(), "device": lambda _: nullcontext(),
        "device_count": lambda: 1, "current_device": lambda: 0, "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (0, properties.total_memory), "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1,
    }  # fmt: skip
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"):
        replacements[name] = nothing
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)


@contextmanager
def everything_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same, and the device "cuda" is there: tensors asked for on it are made on the CPU."""
    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(torch, "Generator", _GeneratorOnCpu)
    with _OnCpu():
        yield
