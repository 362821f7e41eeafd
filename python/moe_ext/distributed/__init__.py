"""Expert parallelism over torch.distributed; routing traces, and the placement of experts that is made of them."""

from moe_ext.distributed.dispatch import combine, dispatch, start_combine, start_dispatch
from moe_ext.distributed.exchange import Exchange, ExchangeError, FlatExchange, HierarchicalExchange
from moe_ext.distributed.expert_map import ExpertMap
from moe_ext.distributed.expert_parallel import ExpertParallelOutput, expert_parallel
from moe_ext.distributed.level import Received
from moe_ext.distributed.options import DispatchOptions
from moe_ext.distributed.pipeline import (
    LinearCost,
    PipelineCosts,
    PipelineProfile,
    choose_degree,
    pipeline_seconds,
    profile_pipeline,
)
from moe_ext.distributed.traces import RoutingTrace, TraceRecorder

__all__ = [
    "DispatchOptions",
    "Exchange",
    "ExchangeError",
    "ExpertMap",
    "ExpertParallelOutput",
    "FlatExchange",
    "HierarchicalExchange",
    "LinearCost",
    "PipelineCosts",
    "PipelineProfile",
    "Received",
    "RoutingTrace",
    "TraceRecorder",
    "choose_degree",
    "combine",
    "dispatch",
    "expert_parallel",
    "pipeline_seconds",
    "profile_pipeline",
    "start_combine",
    "start_dispatch",
]
