"""What machine a result was measured on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import moe_ext
from moe_ext import _library

from .timing import Timer


def _cpu_model() -> str:
    """The name, and family and model beside it: cloud machines of several generations bear one name."""
    try:
        fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        fields = []
    first = {name.strip(): value.strip() for name, value in reversed(fields)}
    if "model name" not in first:
        return platform.processor() or platform.machine()
    if {"cpu family", "model"} <= first.keys():
        return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"
    return first["model name"]


def _commit() -> str | None:
    """The commit of the checkout the benchmark runs from, with + where it has changes; None from a wheel.

    MOE_EXT_COMMIT says it where the checkout has no history."""
    return os.environ.get("MOE_EXT_COMMIT") or _output_of(
        "git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty=+"
    )


def _output_of(*command: str) -> str | None:
    """What a program prints; None where it fails or is not installed."""
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def describe(device: str) -> dict[str, Any]:
    """Versions, processors, and the bandwidths measured now, with all threads."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_ext": moe_ext.build_info(),
        "commit": _commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = properties.name
        info["gpu_memory_bytes"] = properties.total_memory
        info["multiprocessors"] = properties.multi_processor_count
        info["cuda"] = torch.version.cuda
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        info["gpu_state"] = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    info["copy_bytes_per_second"] = copy_bandwidth(device)
    info["read_bytes_per_second"] = read_bandwidth(device)
    if device == "cuda":  # after the bandwidths, with the clocks that work has raised
        info["gpu_now"] = gpu_now(_output_of("nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,PIDS") or "")
        print(f"GPU before the benchmark: {info['gpu_now']}", flush=True)
    return info


def gpu_now(seen: str) -> dict[str, Any] | None:
    """SM clock, what holds it down and the other processes, from what nvidia-smi -q says; None without nvidia-smi.

    Its words are read, not the fields of --query-gpu, whose names differ between drivers."""
    pairs = [[part.strip() for part in line.split(" : ", 1)] for line in seen.splitlines() if " : " in line]
    if not pairs:
        return None
    return {
        "sm_clock": next((value for name, value in pairs if name == "SM"), None),  # the first one is the present one
        "held_down_by": [name for name, value in pairs if value == "Active" and name != "Idle"],
        "other_processes": [value for name, value in pairs if name == "Process ID" and value != str(os.getpid())],
    }


def spend_flops(flops: float, dtype: torch.dtype) -> None:
    """So many floating-point operations of multiply-adds from register to register on all of torch's CPU threads, with
    bfloat16 factors where the machine has instructions for them: the peak that no product exceeds."""
    spend = ctypes.CDLL(str(_library.PACKAGE / "libmoe_ext.so")).moe_ext_spend_flops
    spend.argtypes, spend.restype = (ctypes.c_double, ctypes.c_bool), None
    spend(flops, dtype == torch.bfloat16)


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second by a large copy."""
    size = 2**30 if device == "cuda" else 2**27
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = Timer(device, 15, 5.0).compare({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * size / timing.median


def read_bandwidth(device: str) -> float:
    """Bytes read per second by the fastest of three reductions that write nothing: what weights read once cost."""
    source = torch.rand(2**28 if device == "cuda" else 2**26, device=device)
    reductions = {"sum": source.sum, "amax": source.amax, "dot": lambda: torch.dot(source, source)}
    timings = Timer(device, 15, 5.0).compare(reductions)
    return 4 * source.numel() / min(timing.median for timing in timings.values())
