"""The cost model of the chunked pipeline, against a simulation of its events and on real processes."""

from __future__ import annotations

import pytest
import torch

from moe_ext.distributed import FlatExchange
from moe_ext.distributed.pipeline import (
    DEGREES,
    LinearCost,
    PipelineCosts,
    PipelineProfile,
    choose_degree,
    pipeline_seconds,
    profile_pipeline,
)
from rank_pool import RankPool


def simulated_seconds(costs: PipelineCosts, rows: int, degree: int) -> float:
    """Event by event: one link, first in first out, and one compute unit."""
    out, work, back = (stage.seconds(rows / degree) for stage in costs)
    link = compute = 0.0
    done = []
    for _ in range(degree):
        link += out
        compute = max(compute, link) + work
        done.append(compute)
    for ready in done:
        link = max(link, ready) + back
    return link


def random_costs(seed: int) -> PipelineCosts:
    generator = torch.Generator().manual_seed(seed)
    draw = (10 ** (3 * torch.rand(6, generator=generator, dtype=torch.float64) - 6)).tolist()
    return PipelineCosts(*(LinearCost(draw[i], draw[i + 1] / 100) for i in (0, 2, 4)))


@pytest.mark.parametrize("seed", range(50))
def test_formula_is_the_simulation(seed):
    costs = random_costs(seed)
    for rows in (0, 1, 100, 40000):
        for degree in (1, 2, 3, 4, 8, 16):
            assert pipeline_seconds(costs, rows, degree) == pytest.approx(simulated_seconds(costs, rows, degree))


@pytest.mark.parametrize("seed", range(400))
def test_chosen_degree_is_within_5_percent_of_the_best_of_all(seed):
    """Of all degrees up to 16, and with a longer list up to 64, not only those that the choice is made from."""
    costs = random_costs(seed)
    for rows in (10, 1000, 40000):
        best = min(simulated_seconds(costs, rows, degree) for degree in range(1, 17))
        assert simulated_seconds(costs, rows, choose_degree(costs, rows)) <= 1.05 * best
        chosen = choose_degree(costs, rows, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64))
        best = min(simulated_seconds(costs, rows, degree) for degree in range(1, 65))
        assert simulated_seconds(costs, rows, chosen) <= 1.05 * best


def test_equal_ways_are_fsmoe_s_formula():
    travel, experts = LinearCost(0.0, 2e-6), LinearCost(0.0, 5e-6)
    costs = PipelineCosts(travel, experts, travel)
    for degree in (1, 2, 4, 8):
        t, e = travel.seconds(1000 / degree), experts.seconds(1000 / degree)
        assert pipeline_seconds(costs, 1000, degree) == pytest.approx(max(2 * degree * t, 2 * t + degree * e))


def test_directions_are_weighed_together():
    """The forward alone wants few chunks, the backward many: together the times add up."""
    cheap = PipelineCosts(LinearCost(1e-3, 1e-9), LinearCost(1e-3, 1e-9), LinearCost(1e-3, 1e-9))
    heavy = PipelineCosts(LinearCost(1e-5, 1e-5), LinearCost(1e-5, 2e-5), LinearCost(1e-5, 1e-5))
    assert choose_degree(cheap, 1000) == 1 and choose_degree(heavy, 1000) > 2
    both = choose_degree([cheap, heavy], 1000)
    assert both == min(DEGREES, key=lambda d: pipeline_seconds(cheap, 1000, d) + pipeline_seconds(heavy, 1000, d))


@pytest.mark.parametrize("seed", range(50))
def test_each_direction_may_have_its_own_degree(seed):
    """Forward alone, then forward and backward in other chunks: each within 5% of the best of its simulation."""
    profile = PipelineProfile(random_costs(seed), random_costs(seed + 100))
    for rows in (1000, 40000):
        for costs in ([profile.forward], [profile.forward, profile.backward]):
            totals = {d: sum(simulated_seconds(c, rows, d) for c in costs) for d in range(1, 17)}
            assert totals[choose_degree(costs, rows)] <= 1.05 * min(totals.values())


def test_fit_finds_the_line():
    line = LinearCost(3e-5, 2e-7)
    rows = [64, 512, 4096]
    fitted = LinearCost.fit(rows, [line.seconds(n) for n in rows])
    assert fitted.start == pytest.approx(3e-5) and fitted.per_row == pytest.approx(2e-7)
    assert LinearCost.fit([1, 2], [1.0, 3.0]).start == 0 and LinearCost.fit([1, 2], [3.0, 1.0]).per_row == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LinearCost.fit([8, 8], [1.0, 1.0]), "rows, seconds: expected one positive time"),
        (lambda: LinearCost.fit([8, 9], [1.0, 0.0]), "rows, seconds: expected one positive time"),
        (lambda: pipeline_seconds(random_costs(0), 8, 0), "degree, rows: expected degree >= 1"),
        (lambda: choose_degree(random_costs(0), 8, ()), "degrees: expected at least one"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def profile_on_rank(group):
    weight = torch.randn(48, 48)
    return profile_pipeline(FlatExchange(group), lambda rows: (rows @ weight).tanh(), 48, [16, 256, 2048], rounds=3)


def test_profile_is_the_same_on_all_ranks(tmp_path):
    with RankPool(2, tmp_path) as pool:
        first, second = pool.run(2, profile_on_rank)
    assert first == second
    for costs in first:
        assert all(stage.seconds(2048) > 0 for stage in costs)
    assert first.forward.dispatch == first.backward.combine and first.forward.experts != first.backward.experts
    assert choose_degree(list(first), 2048) in DEGREES
