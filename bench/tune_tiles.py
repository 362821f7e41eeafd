"""Times every compiled sm_90a tile of the grouped products on the shapes of table B: ``python -m bench tune-tiles``.

A tile is forced with the environment variable that csrc/grouped_gemm/tile_choice.h reads at each launch. The result
says for each product which tile is fastest, which one the cost model there chose, and what that choice costs (regret).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moe_ext

from .bench_grouped_gemm import gemm_shapes
from .case import TOLERANCE, Context, relative_difference
from .timing import Timing, graphed

TILE_VARIABLE = "MOE_EXT_SM90_TILE"

Run = Callable[[], Tensor]
Time = Callable[[dict[str, Run]], dict[str, Timing]]


class Product(NamedTuple):
    """One grouped product and what the cost model knows of it: groups, average rows and columns of its result."""

    shape: str
    direction: str
    run: Run
    groups: int
    rows: int
    columns: int
    flops: float


class Tiles(NamedTuple):
    """The compiled tiles, and the model's choice among them from (groups, rows, columns)."""

    names: list[str]
    choose: Callable[[int, int, int], str]


def compiled_tiles() -> Tiles:
    from moe_ext import _host

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return Tiles(
        [tile["name"] for tile in _host.sm90_tiles()],
        lambda groups, rows, columns: _host.choose_sm90_tile(groups, rows, columns, multiprocessors),
    )


@contextmanager
def forced(tile: str | None) -> Iterator[None]:
    """Inside, every product runs on this tile; None leaves the choice to the model."""
    before = os.environ.pop(TILE_VARIABLE, None)
    if tile is not None:
        os.environ[TILE_VARIABLE] = tile
    try:
        yield
    finally:
        os.environ.pop(TILE_VARIABLE, None)
        if before is not None:
            os.environ[TILE_VARIABLE] = before


def forced_run(tile: str | None, run: Run) -> Run:
    def forced_to_tile() -> Tensor:
        with forced(tile):
            return run()

    return forced_to_tile


def products(context: Context, dtype: torch.dtype) -> Iterator[Product]:
    """Forward, dgrad and wgrad of the shapes of table B."""
    for name, groups, rows, n, k in gemm_shapes(context.profile):
        each, flops = rows // groups, 2.0 * rows * n * k
        offsets = torch.arange(groups + 1, device=context.device, dtype=torch.int32) * each
        x = context.rows(rows, k, dtype=dtype)
        weight = context.rows(groups, n, k, dtype=dtype, scale=k**-0.5, seed=1)
        grad = context.rows(rows, n, dtype=dtype, seed=2)
        runs: dict[str, Run] = {
            "forward": partial(moe_ext.grouped_gemm, x, weight, offsets, weight_layout="enk"),
            "dgrad": partial(moe_ext.grouped_gemm, grad, weight, offsets, weight_layout="ekn"),
            "wgrad": partial(moe_ext.grouped_gemm_wgrad, x, grad, offsets, weight_layout="enk"),
        }
        results = {"forward": (each, n), "dgrad": (each, k), "wgrad": (n, k)}
        for direction, run in runs.items():
            yield Product(name, direction, run, groups, *results[direction], flops)


def check(product: Product, tiles: list[str], tolerance: float) -> None:
    """A tile that computes something else has no time worth writing down."""
    expected = forced_run(None, product.run)()
    for tile in tiles:
        difference = relative_difference(forced_run(tile, product.run)(), expected)
        if not difference <= tolerance:
            raise AssertionError(f"{product.shape} {product.direction}: tile {tile} differs by {difference:.3g}")


def sweep(
    swept: Iterator[Product], tiles: Tiles, time: Time, tolerance: float, prepare: Callable[[Run], Run]
) -> list[dict[str, Any]]:
    """One row of the choice table for each product; ``prepare`` turns a run on a forced tile into what is timed."""
    rows = []
    for product in swept:
        check(product, tiles.names, tolerance)
        timings = time({tile: prepare(forced_run(tile, product.run)) for tile in tiles.names})
        seconds = {tile: timings[tile].median for tile in tiles.names}
        with forced(None):
            chosen = tiles.choose(product.groups, product.rows, product.columns)
        best = min(seconds, key=seconds.__getitem__)
        rows.append({
            "shape": product.shape,
            "direction": product.direction,
            "groups": product.groups,
            "rows_per_group": product.rows,
            "columns": product.columns,
            "seconds": seconds,
            "best": best,
            "best_flops_per_second": product.flops / seconds[best],
            "chosen": chosen,
            "regret": seconds[chosen] / seconds[best] - 1,
        })  # fmt: skip
    return rows


def tune(context: Context, time: Time) -> list[dict[str, Any]]:
    if context.device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("tune-tiles: the tiles are those of sm_90a, and here is no GPU of compute capability 9.0")
    tiles = compiled_tiles()
    if not tiles.names:
        raise SystemExit("tune-tiles: this build of moe_ext lists no sm_90a tiles")
    dtype = context.dtypes[0]
    # As graphs: the launch is no part of the comparison, and the tile is the one that was forced at capture.
    return sweep(products(context, dtype), tiles, time, TOLERANCE[dtype], graphed)
