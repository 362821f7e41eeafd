"""Expert parallelism in static sizes on one GPU: NCCL with one rank, and four ranks that are all this one.

Nothing is special about one rank: rows are packed, sent and unpacked. Steps are those of tests/parallel_steps.py, which
tests/test_capture_steps.py runs on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from test_gpu_capture import assert_replays_equal_eager, sync_is_an_error
from torch import Tensor

from capture_steps import TOKENS, assert_same, make_inputs
from compare import relative_error
from delayed_exchange import DelayedExchange
from moe_ext.distributed import DispatchOptions, Exchange, FlatExchange
from parallel_steps import PARALLEL, MakeExchange, dense_twin, make_parallel_layer, make_parallel_step, step_of

CYCLES = 1_000_000  # about half a millisecond
DRY_RUN = os.environ.get("MOE_EXT_GPU_TESTS_ON") == "cpu"


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one; in a dry run gloo's."""
    if not DRY_RUN:
        torch.cuda.set_device(0)
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("gloo" if DRY_RUN else "nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["nccl", "four ranks in one"])
def make_exchange(request: pytest.FixtureRequest) -> MakeExchange:
    if request.param == "nccl":
        request.getfixturevalue("nccl")
        return lambda num_ranks: FlatExchange()
    return lambda num_ranks: DelayedExchange(num_ranks, CYCLES)


@pytest.fixture(autouse=True)
def overflow_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU rows that do not fit are reported by the host, which waits for their number; on a GPU by the device."""

    def report_overflow(exchange: Exchange, dropped: Tensor, name: str, bound: int) -> None:
        every = exchange.gather(dropped.reshape(1), "the rows that did not fit").flatten()
        torch._assert_async((every == 0).all(), f"{name}: expected all rows to fit into {bound}")

    for module in ("dispatch", "node_dispatch") if DRY_RUN else ():
        monkeypatch.setattr(import_module(f"moe_ext.distributed.{module}"), "report_overflow", report_overflow)


@pytest.mark.parametrize("tokens", ["decode", "few"])
@pytest.mark.parametrize("name", PARALLEL)
def test_no_step_syncs(name, tokens, make_exchange, device):
    step = make_parallel_step(name, TOKENS[tokens], torch.bfloat16, device, make_exchange)
    inputs = make_inputs(TOKENS[tokens], torch.bfloat16, device)
    expected = step(inputs)  # makes tables, streams and communicators
    with sync_is_an_error():
        results = step(inputs)
    assert_same(results, expected)


@pytest.mark.parametrize("name", PARALLEL)
def test_replay_with_other_routing(name, make_exchange, device, request):
    if DRY_RUN and "nccl" in request.node.callspec.params.values():
        pytest.skip("gloo's exchanges are waited for in Python, which the stand-in for a graph does not repeat")
    num_tokens = TOKENS["few"]
    step = make_parallel_step(name, num_tokens, torch.bfloat16, device, make_exchange)
    assert_replays_equal_eager(step, num_tokens, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, how in PARALLEL.items() if "overflow" not in how])
def test_equals_the_layer_in_one_process(name, dtype, make_exchange, device):
    num_tokens = TOKENS["few"]
    layer = make_parallel_layer(name, num_tokens, make_exchange).to(device, dtype)
    inputs = make_inputs(num_tokens, dtype, device)
    ours, dense = step_of(layer)(inputs), step_of(dense_twin(layer))(inputs)
    allowed = 8e-2 if "fp8" in name else 2e-2 if dtype == torch.bfloat16 else 1e-4
    for mine, exact in zip(ours[:2], dense[:2], strict=True):  # output, gradient of hidden
        assert relative_error(mine, exact) < allowed
    share = len(layer.local_experts)
    for place, (parameter, _) in enumerate(layer.named_parameters()):
        mine, exact = ours[2 + place], dense[2 + place]
        if parameter.startswith("experts."):
            exact = exact.double().unflatten(0, (-1, share)).sum(0)
        assert relative_error(mine, exact) < allowed, parameter


def test_exact_sizes_equal_static_ones(make_exchange, device):
    """The counts are read by the host here; rows and their order are the same."""
    num_tokens = TOKENS["few"]
    layer = make_parallel_layer("chunks", num_tokens, make_exchange).to(device, torch.bfloat16)
    inputs = make_inputs(num_tokens, torch.bfloat16, device)
    static = step_of(layer)(inputs)
    layer.dispatch = DispatchOptions()
    exact = step_of(layer)(inputs)
    for mine, theirs in zip(exact, static, strict=True):
        assert relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("name", ["chunks", "chunks, slots, fp8", "two levels", "nodes, chunks, fp8"])
def test_late_exchanges_among_other_allocations(name, device):
    """No buffer is read before its exchange is over, and none is given to another tensor before that.

    Exchanges are late by more than everything else takes, and after each phase the allocator's free blocks are taken
    and overwritten, so that what was freed too early holds something else.
    """
    num_tokens = TOKENS["few"]

    def make_late(num_ranks: int) -> Exchange:
        return Churning(num_ranks, CYCLES)

    inputs = make_inputs(num_tokens, torch.bfloat16, device)
    at_once = make_parallel_step(name, num_tokens, torch.bfloat16, device, DelayedExchange)
    expected = at_once(inputs)
    late = make_parallel_step(name, num_tokens, torch.bfloat16, device, make_late)
    for _ in range(3):
        assert_same(late(inputs), expected)


class Churning(DelayedExchange):
    """Overwrites what is free, on the caller's stream, whenever an exchange was started."""

    def start(self, rows, splits, **more):
        pending = super().start(rows, splits, **more)
        for size in (rows.numel() * rows.element_size(), 1 << 12, 1 << 16, 1 << 20):
            blocks = [torch.empty(max(size, 1), dtype=torch.uint8, device=rows.device) for _ in range(4)]
            for block in blocks:
                block.fill_(0xFF)  # NaN, as floating point
        return pending


def test_dropped_rows_are_counted(make_exchange, device):
    num_tokens = TOKENS["few"]
    layer = make_parallel_layer("dropping", num_tokens, make_exchange).to(device, torch.bfloat16)
    layer(make_inputs(num_tokens, torch.bfloat16, device)[0])
    statistics = layer.statistics
    owner = torch.bucketize(statistics.topk_ids.cpu(), layer.rank_expert_offsets.cpu(), right=True) - 1
    bound = layer.dispatch.rows_per_rank
    wanted = [int((owner == rank).any(1).sum()) for rank in range(layer.exchange.num_ranks)]
    assert int(statistics.dropped_rows) == sum(max(0, rows - bound) for rows in wanted) > 0
