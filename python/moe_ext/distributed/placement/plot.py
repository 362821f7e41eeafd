"""Load per rank before and after a change of placement, as a picture."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike, NDArray


def plot_rank_loads(
    before: ArrayLike,
    after: ArrayLike,
    path: str | os.PathLike[str],
    *,
    before_name: str = "before",
    after_name: str = "after",
) -> None:
    """Writes a picture of two [num_layers, num_ranks] loads: all layers, and the layer that was least balanced before.

    Loads are shown relative to the mean of their layer, so that 1 is perfect balance. The suffix of ``path`` picks the
    format.

    Raises ImportError without matplotlib (``pip install 'moe_ext[placement]'``), ValueError for other shapes.
    """
    loads = [np.asarray(values, dtype=np.float64) for values in (before, after)]
    if loads[0].ndim != 2 or loads[0].size == 0 or loads[0].shape != loads[1].shape:
        shapes = " and ".join(str(list(values.shape)) for values in loads)
        raise ValueError(f"before, after: expected two [num_layers, num_ranks] of one size, got {shapes}")
    relative = [_relative(values) for values in loads]
    names = [
        f"{name}: mean / max = {(1 / values.max(1)).mean():.3f}"
        for name, values in zip((before_name, after_name), relative, strict=True)
    ]
    # Figure itself, not pyplot: no window system, no global state.
    figure = _matplotlib("figure").Figure(figsize=(10, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 2])
    maps = [figure.add_subplot(grid[0, column]) for column in range(2)]
    # A load of 1 is white on every picture; the hottest rank of either sets the end of the scale.
    end = max(values.max() for values in relative)
    scale = _matplotlib("colors").TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(end, 1.0 + 1e-6))
    for axes, values, name in zip(maps, relative, names, strict=True):
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=scale, interpolation="nearest")
        axes.set(title=name, xlabel="rank", ylabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=maps, label="load / mean of the layer")
    worst = int(relative[0].max(1).argmax())
    axes, ranks = figure.add_subplot(grid[1, :]), np.arange(relative[0].shape[1])
    axes.bar(ranks - 0.2, relative[0][worst], 0.4, label=before_name, color="tab:red")
    axes.bar(ranks + 0.2, relative[1][worst], 0.4, label=after_name, color="tab:blue")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(title=f"least balanced layer ({before_name}): {worst}", xlabel="rank", ylabel="load / mean")
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=120)


def _relative(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = loads.mean(1, keepdims=True)
    relative: NDArray[np.float64] = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
    return relative


def _matplotlib(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as error:
        raise ImportError("plots need matplotlib; run: pip install 'moe_ext[placement]'") from error
