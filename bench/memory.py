"""The memory table: how far a forward and backward of a layer lifts the peak above its inputs and weights.

Each contender runs in a process of its own, so that nobody inherits another's caches, after a tiny layer has loaded
libraries and started threads. On the CPU the peak is the kernel's high-water mark of resident memory (VmHWM), reset
when inputs, weights and incoming gradient are allocated and written: whatever the allocator, pages that were touched
count, freed ones that went back do not. On CUDA it is ``torch.cuda.max_memory_allocated``. The gradients that every
contender has to return are part of the peak; their size stands beside it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .bench_experts import layers_of
from .case import Context
from .layers import Layer
from .shapes import LayerShape

CHILD_SECONDS = 120
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): resets the high-water mark of resident memory


def rows(context: Context) -> list[dict[str, Any]]:
    """One row for each layer and dtype."""
    found = []
    for dtype in context.dtypes:
        for shape in layers_of(context):
            layer = Layer(context, shape, dtype, "uniform")
            names, skipped = list(layer.steps()), {**layer.skipped, **layer.skipped_backward}
            gradients = sum(x.numel() * x.element_size() for x in layer.arguments)
            del layer
            context.weights.clear()
            peaks = {}
            for name in names:
                answer = _ask_child(name, shape, dtype, context)
                if isinstance(answer, int):
                    peaks[name] = answer
                else:
                    skipped[name] = answer
            if "ours" in peaks:
                found.append(_row(shape, dtype, peaks, gradients, skipped))
            else:
                print(f"memory of {shape.name} not measured: {skipped['ours']}", file=sys.stderr)
    return found


def _row(
    shape: LayerShape, dtype: torch.dtype, peaks: dict[str, int], gradients: int, skipped: dict[str, str]
) -> dict[str, Any]:
    ours = peaks.pop("ours")
    best = min(peaks, key=peaks.__getitem__) if peaks else None
    return {
        "op": "moe_mlp_backward",
        "table": "memory",
        "shape": f"{shape.name} T={shape.num_tokens}",
        "dtype": str(dtype).removeprefix("torch."),
        "routing": "uniform",
        "direction": "forward+backward",
        "peak_bytes": ours,
        "gradient_bytes": gradients,
        "peer_peak_bytes": peaks,
        "skipped_peers": skipped,
        "best_peer": best,
        "best_peer_over_ours": peaks[best] / ours if best else None,
    }


def _ask_child(name: str, shape: LayerShape, dtype: torch.dtype, context: Context) -> int | str:
    """Peak in bytes, or why there is none."""
    asked = {"name": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "device": context.device}
    command = [sys.executable, "-m", "bench.memory", json.dumps(asked)]
    root = Path(__file__).resolve().parent.parent
    try:
        child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"took more than {CHILD_SECONDS} s"
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return int(child.stdout.splitlines()[-1])


def peak_of(name: str, shape: LayerShape, dtype: torch.dtype, device: str) -> int:
    """Bytes that one forward and backward adds at its peak, in this process."""
    context = Context(device, "quick", [dtype])
    tiny = shape._replace(num_tokens=8, hidden_size=64, intermediate_size=64, num_experts=4, topk=2)
    Layer(context, tiny, dtype, "uniform").steps()[name]()
    step = Layer(context, shape, dtype, "uniform").steps()[name]
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _resident_bytes("VmHWM")
    step()
    return _resident_bytes("VmHWM") - before


def _return_freed_memory() -> None:
    """What building the inputs left in malloc's hands would hide as much of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    asked = json.loads(sys.argv[1])
    dtype = getattr(torch, asked["dtype"])
    print(peak_of(asked["name"], LayerShape(*asked["shape"]), dtype, asked["device"]))


if __name__ == "__main__":
    main()
