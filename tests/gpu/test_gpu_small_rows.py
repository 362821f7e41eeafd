import pytest
import torch

from test_small_rows import *  # noqa: F403
from test_small_rows import DTYPES, MlpCase, assert_forward_matches, moe_ext


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_graph_replay_with_other_routing(num_tokens, dtype, device):
    """Each replay waits for the kernels before it, whatever the routing: the two products may overlap at their seam."""
    shape = (num_tokens, 256, 192, 32, 4)
    case = MlpCase(shape, "uniform", dtype=dtype, device=device, bias=True)
    forward = case.forward(moe_ext)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        forward(*case.args)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = forward(*case.args)
    for routing in ("uniform", "one_hot", "dropped", "zipf"):
        other = MlpCase(shape, routing, dtype=dtype, device=device, bias=True)
        for field, new in zip(case.plan, other.plan, strict=True):
            field.copy_(new)
        case.args[0].mul_(1.25)
        for _ in range(20):
            graph.replay()
        assert torch.equal(captured, forward(*case.args))
        assert_forward_matches(case)
