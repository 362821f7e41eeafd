"""Training on the ops: the loss falls, and as on the reference ops."""

from __future__ import annotations

import torch

from bench import language_model


def test_loss_falls_and_matches_the_reference():
    kernels = language_model.train(25, "kernels")
    twins = language_model.train(4, "reference")
    print([round(x, 3) for x in kernels.losses[::6]])
    assert kernels.losses[-1] < kernels.losses[0] - 1.5
    torch.testing.assert_close(kernels.losses[:4], twins.losses, rtol=1e-5, atol=0)


def test_recorded_routing():
    ids = language_model.record_routing(language_model.train(2), 3000)
    assert ids.shape == (3000, language_model.TOPK) and ids.dtype == torch.int32
    assert (ids >= 0).all() and (ids < language_model.NUM_EXPERTS).all() and (ids[:, 0] != ids[:, 1]).all()
