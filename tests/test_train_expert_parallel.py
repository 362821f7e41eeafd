"""Training with experts over ranks: as in one process, and on from a checkpoint on fewer ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from bench import language_model
from bench.train_expert_parallel import train
from moe_ext.distributed import DispatchOptions
from rank_pool import RankPool

STEPS = 3


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with RankPool(4, tmp_path_factory.mktemp("pool")) as pool:
        yield pool


def train_on_ranks(group, steps, folder, resume, form, degree):
    mesh = DeviceMesh.from_group(group, "cpu")
    return train(mesh, steps, folder and Path(folder), resume=resume, options=DispatchOptions(form), degree=degree)


def test_four_ranks_train_as_one_process_and_two_go_on(pool, tmp_path):
    """The losses differ by rounding, and by the balance loss, which each rank takes of its own tokens."""
    alone = language_model.train(2 * STEPS).losses
    folder = str(tmp_path / "checkpoint")
    first = pool.run(4, train_on_ranks, STEPS, folder, False, "dedup", 1)
    assert all(progress == first[0] for progress in first) and first[0].next_step == STEPS
    assert first[0].losses[0] == pytest.approx(alone[0], rel=1e-5)
    torch.testing.assert_close(first[0].losses, alone[:STEPS], rtol=2e-3, atol=0)

    straight = pool.run(4, train_on_ranks, 2 * STEPS, None, False, "slot", 2)[0].losses
    torch.testing.assert_close(straight[:STEPS], first[0].losses, rtol=1e-4, atol=0)
    second = pool.run(2, train_on_ranks, STEPS, folder, True, "dedup", 1)
    assert second[0].next_step == 2 * STEPS
    # The first loss is of the parameters read back; the later ones need the optimizer's state too.
    assert second[0].losses[0] == pytest.approx(straight[STEPS], rel=1e-4)
    torch.testing.assert_close(second[0].losses, straight[STEPS:], rtol=2e-3, atol=0)
