"""Expert parallelism: routing traces and expert placement."""

from moe_ext.distributed.traces import RoutingTrace, TraceRecorder

__all__ = ["RoutingTrace", "TraceRecorder"]
