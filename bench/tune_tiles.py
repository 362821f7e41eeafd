"""Times every compiled sm_90a tile of the grouped products on the shapes of table B: ``python -m bench tune-tiles``.

A tile is forced with the environment variable that csrc/grouped_gemm/tile_choice.h reads at each launch. The result
says for each product which tile is fastest, which one the cost model there chose, and what that choice costs (regret).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moe_ext

from .bench_grouped_gemm import gemm_shapes
from .case import TOLERANCE, Context, first_line, relative_difference
from .gpu_names import TILE_VARIABLE
from .timing import Timing, graphed
from .watchdog import watch

Run = Callable[[], Tensor]
Time = Callable[[dict[str, Run]], dict[str, Timing]]


class Product(NamedTuple):
    """One grouped product, the same by torch alone, and what the cost model knows of it: groups, average rows and
    columns of its result."""

    shape: str
    direction: str
    run: Run
    reference: Run  # the model's choice is a tile too, and may be the wrong one
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
        bounds = list(pairwise(range(0, rows + 1, each)))
        references: dict[str, Run] = {
            "forward": partial(by_group, torch.cat, lambda e, a, b, x=x, w=weight: x[a:b] @ w[e].T, bounds),
            "dgrad": partial(by_group, torch.cat, lambda e, a, b, g=grad, w=weight: g[a:b] @ w[e], bounds),
            "wgrad": partial(by_group, torch.stack, lambda e, a, b, x=x, g=grad: g[a:b].T @ x[a:b], bounds),
        }
        results = {"forward": (each, n), "dgrad": (each, k), "wgrad": (n, k)}
        for direction, run in runs.items():
            yield Product(name, direction, run, references[direction], groups, *results[direction], flops)


def by_group(
    join: Callable[[list[Tensor]], Tensor],
    product: Callable[[int, int, int], Tensor],
    bounds: list[tuple[int, int]],
) -> Tensor:
    return join([product(expert, first, end) for expert, (first, end) in enumerate(bounds)])


def usable(
    product: Product, tiles: list[str], tolerance: float, prepare: Callable[[Run], Run], errors: list[str]
) -> dict[str, Run]:
    """What is timed, for each tile that computes the product; ``errors`` has a line for each that does not."""
    expected, runs = product.reference(), {}
    for tile in tiles:
        try:
            run = prepare(forced_run(tile, product.run))
            difference = relative_difference(run(), expected)
            if not difference <= tolerance:
                raise AssertionError(f"differs by {difference:.3g}, allowed {tolerance:.3g}")
            runs[tile] = run
        except Exception as error:  # the other tiles are worth their time
            errors.append(f"{product.shape} {product.direction}: tile {tile}: {first_line(error)}")
            print(errors[-1], file=sys.stderr, flush=True)
    return runs


def row_of(product: Product, seconds: dict[str, float], chosen: str) -> dict[str, Any]:
    """One row of the choice table; no regret where the model's choice has no time."""
    best = min(seconds, key=seconds.__getitem__)
    return {
        "shape": product.shape,
        "direction": product.direction,
        "groups": product.groups,
        "rows_per_group": product.rows,
        "columns": product.columns,
        "seconds": seconds,
        "best": best,
        "best_flops_per_second": product.flops / seconds[best],
        "chosen": chosen,
        "regret": seconds[chosen] / seconds[best] - 1 if chosen in seconds else None,
    }


@dataclass
class Sweep:
    """What is known so far: a row for each product, a line for each tile that could not be timed on one."""

    save: Callable[[Sweep], None]  # called after each product
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    product_seconds: float | None = None  # a product that takes longer hangs

    def run(
        self, swept: Iterator[Product], tiles: Tiles, time: Time, tolerance: float, prepare: Callable[[Run], Run]
    ) -> None:
        """``prepare`` turns a run on a forced tile into what is timed."""
        for product in swept:
            with watch(f"{product.shape} {product.direction}", self.product_seconds, self._hangs):
                try:
                    self._measure(product, tiles, time, tolerance, prepare)
                except Exception as error:
                    self.errors.append(f"{product.shape} {product.direction}: {first_line(error)}")
            self.save(self)

    def _measure(
        self, product: Product, tiles: Tiles, time: Time, tolerance: float, prepare: Callable[[Run], Run]
    ) -> None:
        runs = usable(product, tiles.names, tolerance, prepare, self.errors)
        if not runs:
            return
        seconds = {tile: timing.median for tile, timing in time(runs).items()}
        with forced(None):
            chosen = tiles.choose(product.groups, product.rows, product.columns)
        self.rows.append(row_of(product, seconds, chosen))

    def _hangs(self, line: str) -> None:
        self.errors.append(line)
        self.save(self)


def tune(context: Context, time: Time, sweep: Sweep, only: list[str] | None = None) -> None:
    """Every compiled tile, or ``only`` some, on the products of table B."""
    if context.device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("tune-tiles: the tiles are those of sm_90a, and here is no GPU of compute capability 9.0")
    tiles = compiled_tiles()
    if not tiles.names:
        raise SystemExit("tune-tiles: this build of moe_ext lists no sm_90a tiles")
    if unknown := set(only or ()) - set(tiles.names):
        raise SystemExit(f"tune-tiles: unknown {', '.join(sorted(unknown))}; compiled: {', '.join(tiles.names)}")
    tiles = tiles._replace(names=[name for name in tiles.names if only is None or name in only])
    dtype = context.dtypes[0]
    # As graphs: the launch is no part of the comparison, and the tile is the one that was forced at capture.
    sweep.run(products(context, dtype), tiles, time, TOLERANCE[dtype], graphed)
