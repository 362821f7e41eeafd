"""ExpertFlow, simulated: a learned predictor, fewer experts per batch, outputs in their places, hits above LRU's."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_same, rows
from torch import nn

from compare import relative_error
from moe_ext.distributed.offload_simulation import needed_experts
from moe_ext.nn import MoELayer
from moe_ext.recipes import RoutePredictor, compare_caches, run_regrouped

LAYERS, EXPERTS, HIDDEN = 3, 16, 12


class Stack(nn.Module):
    """Mixtures one after another; ``routes`` are those of the last call, [num_layers, num_tokens, topk]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoELayer(HIDDEN, 8, EXPERTS, 2) for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden).hidden
        self.routes = torch.stack([layer.statistics.topk_ids for layer in self.layers])
        return hidden


@pytest.fixture(scope="module")
def served() -> tuple[Stack, RoutePredictor, torch.Tensor]:
    """A model, a predictor that saw its routes on other tokens, and tokens of a few topics that it did not see."""
    torch.manual_seed(0)
    model, predictor = Stack(), RoutePredictor(HIDDEN, LAYERS, EXPERTS, 2)
    topics = 2 * torch.randn(6, HIDDEN)
    seen, new = (topics[torch.randint(6, (n,))] + 0.3 * torch.randn(n, HIDDEN) for n in (1024, 256))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    with torch.no_grad():
        model(seen)
    for _ in range(60):
        optimizer.zero_grad()
        predictor.loss(seen, model.routes).backward()
        optimizer.step()
    return model, predictor, new


def test_loss_is_a_binary_cross_entropy_per_expert():
    predictor = RoutePredictor(HIDDEN, LAYERS, EXPERTS, 2).double()
    embeddings, routes = rows(7, HIDDEN), torch.randint(-1, EXPERTS, (LAYERS, 7, 2))
    logits = predictor(embeddings)
    routes[0, 0] = torch.tensor([-1, 3])
    expected = 0.0
    for layer in range(LAYERS):
        for token in range(7):
            for expert in range(EXPERTS):
                p = torch.sigmoid(predictor.net(embeddings)[token, layer * EXPERTS + expert])
                count = routes[layer, token].tolist().count(expert)
                expected = expected - count * p.log() - (1 - count) * (1 - p).log()
    assert logits.shape == (LAYERS, 7, EXPERTS)
    found = predictor.loss(embeddings, routes)
    assert_same([found], [expected / (LAYERS * 7 * EXPERTS)], [embeddings, *predictor.parameters()])


@torch.no_grad()
def test_routes_of_new_tokens_are_predicted(served):
    model, predictor, hidden = served
    model(hidden)
    right = (predictor.predict(hidden)[..., None] == model.routes[..., None, :]).any(-1)
    assert right.double().mean() > 0.8  # 2 / 16 by chance


@torch.no_grad()
def test_regrouped_batches_need_fewer_experts_and_outputs_keep_their_places(served):
    model, predictor, hidden = served
    hidden, counts = hidden[:64], []

    def run(part: torch.Tensor) -> torch.Tensor:
        output = model(part)
        counts.append(needed_experts(model.routes.numpy(), EXPERTS, len(part)).sum())
        return output

    in_order = torch.cat([run(hidden[:32]), run(hidden[32:])])
    regrouped = run_regrouped(run, hidden, predictor.predict(hidden), EXPERTS)
    assert relative_error(regrouped, in_order) < 1e-5
    assert sum(counts[2:]) < 0.9 * sum(counts[:2])


@torch.no_grad()
def test_the_predictive_cache_beats_lru(served):
    model, predictor, hidden = served
    model(hidden)
    predictive, lru = compare_caches(
        model.routes, predictor.predict(hidden), EXPERTS, batch_size=4, capacity=20, prefetch_per_layer=3
    )
    assert predictive.hits + predictive.misses == lru.hits + lru.misses
    assert predictive.hit_rate > lru.hit_rate + 0.1
