"""The tile sweep with made-up tiles and a made-up clock: what is forced, what is written, what the table says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench import gpu_names, report, tune_tiles
from bench.case import Context
from bench.timing import Timing
from bench.tune_tiles import TILE_VARIABLE, Product, Tiles

ROOT = Path(__file__).resolve().parent.parent
TILES = ["large", "small", "tall"]
# Seconds of a tile by the rows of a group: large groups like large tiles.
SECONDS = {4096: {"large": 1.0, "small": 1.5, "tall": 1.2}, 16: {"large": 4.0, "small": 2.0, "tall": 2.5}}


class Clock:
    """Runs every contender and writes down the tile that was forced meanwhile."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.now = ""

    def product(self, rows: int) -> Product:
        def run() -> torch.Tensor:
            self.now = os.environ.get(TILE_VARIABLE, "the model's")
            self.rows = rows
            return torch.ones(3)

        return Product(f"rows {rows}", "forward", run, lambda: torch.ones(3), 8, rows, 64, flops=2e12)

    def time(self, contenders):
        timings = {}
        for name, run in contenders.items():
            run()
            self.seen.append((name, self.now))
            timings[name] = Timing(SECONDS[self.rows][self.now], 0.0, 1)
        return timings


@pytest.fixture
def rows() -> list[dict]:
    clock, saved = Clock(), []
    tiles = Tiles(TILES, lambda groups, rows, columns: "large" if rows * columns > 4096 * 32 else "tall")
    sweep = tune_tiles.Sweep(lambda sweep: saved.append(len(sweep.rows)))
    sweep.run(iter([clock.product(4096), clock.product(16)]), tiles, clock.time, 0.0, lambda run: run)
    assert clock.seen == [(tile, tile) for _ in range(2) for tile in TILES]
    assert saved == [1, 2] and not sweep.errors
    return sweep.rows


def test_best_choice_and_regret(rows):
    assert [(row["best"], row["chosen"]) for row in rows] == [("large", "large"), ("small", "tall")]
    assert [row["regret"] for row in rows] == [0.0, pytest.approx(0.25)]
    assert rows[0]["best_flops_per_second"] == 2e12 and rows[1]["best_flops_per_second"] == 1e12
    assert rows[1]["seconds"] == SECONDS[16]
    assert TILE_VARIABLE not in os.environ


def test_json_and_markdown(rows, tmp_path):
    path = tmp_path / "gpu-tiles.json"
    machine = {"gpu": "X", "torch": "1", "commit": "c", "copy_bytes_per_second": 1e12}
    report.write_json(path, machine, [], {"command": "python -m bench tune-tiles", "tiles": rows})
    assert json.loads(path.read_text())["tiles"] == rows
    text = report.markdown(path)
    assert "fastest tile for 1 of 2 products; regret 12.5% on average, 25.0% at most" in text
    assert "| shape | direction | large | small | tall | TFLOP/s | regret |" in text
    assert "| rows 4096 | forward | **1 s** * | 1.5 s | 1.2 s | 2 | 0.0% |" in text
    assert "| rows 16 | forward | 4 s | **2 s** | 2.5 s * | 1 | 25.0% |" in text


@pytest.mark.parametrize("bad", ["large", "small"])
def test_a_tile_that_fails_costs_itself_only(bad, tmp_path):
    """One that computes something else, be it the model's choice, one that raises: the others are timed and saved."""

    def run() -> torch.Tensor:
        forced = os.environ.get(TILE_VARIABLE)
        if forced == "tall":
            raise RuntimeError("CUDA error: invalid argument\nand more")
        return torch.full((4,), 2.0 if forced == bad else 1.0)

    def time(runs):
        assert "next" not in now, "the whole product fails"
        return {name: Timing(1.0, 1.0, 1) for name in runs}

    now: list[str] = []
    product = Product("x", "forward", run, lambda: torch.ones(4), 1, 1, 1, 1.0)

    def products():
        yield product
        now.append("next")
        yield product._replace(shape="y")

    sweep = tune_tiles.Sweep(lambda sweep: None)
    sweep.run(products(), Tiles(TILES, lambda *_: "large"), time, 1e-3, lambda run: run)
    good = ({"large", "small"} - {bad}).pop()
    assert [(row["shape"], row["seconds"], row["best"]) for row in sweep.rows] == [("x", {good: 1.0}, good)]
    assert sweep.rows[0]["regret"] == (None if bad == "large" else 0.0)
    wrong, raised, *_, last = sweep.errors
    assert wrong == f"x forward: tile {bad}: AssertionError: differs by 1, allowed 0.001"
    assert raised == "x forward: tile tall: RuntimeError: CUDA error: invalid argument"
    assert last == "y forward: AssertionError: the whole product fails"
    rows = [sweep.rows[0], {**sweep.rows[0], "seconds": {"tall": 2.0}, "best": "tall", "regret": None}]
    assert "| **2 s** |" in report.tile_table(rows)[-2] and report.tile_table(rows)[-2].endswith("| - |")


def test_every_compiled_tile_is_swept(monkeypatch):
    """Those that the cost model does not choose too."""
    from moe_ext import _host

    listed = re.findall(
        r'\{"(\w+)", \d+, \d+, \d+, \d+, (\d+)\}', (ROOT / "csrc/grouped_gemm/tile_choice.h").read_text()
    )
    names = [name for name, _ in listed]
    assert names == [*gpu_names.TILES, gpu_names.CUTLASS_TILE]
    assert list(gpu_names.CHOSEN_TILES) == [name for name, rate in listed if int(rate)]
    monkeypatch.setattr(_host, "sm90_tiles", lambda: [{"name": name} for name in names])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    swept = []
    monkeypatch.setattr(tune_tiles.Sweep, "run", lambda self, products, tiles, *_: swept.append(tiles.names))
    context, sweep = Context("cuda", "gpu", [torch.bfloat16]), tune_tiles.Sweep(lambda sweep: None)
    tune_tiles.tune(context, lambda _: {}, sweep)
    tune_tiles.tune(context, lambda _: {}, sweep, ["128x256x2", "64x256"])
    assert swept == [names, ["64x256", "128x256x2"]]
    with pytest.raises(SystemExit, match="unknown 1x1"):
        tune_tiles.tune(context, lambda _: {}, sweep, ["1x1"])


def test_forced_restores_what_was_there(monkeypatch):
    monkeypatch.setenv(TILE_VARIABLE, "tall")
    with tune_tiles.forced(None):
        assert TILE_VARIABLE not in os.environ
    with pytest.raises(ValueError), tune_tiles.forced("small"):
        assert os.environ[TILE_VARIABLE] == "small"
        raise ValueError
    assert os.environ[TILE_VARIABLE] == "tall"


def test_products_of_table_b():
    """The shapes run, and the model is asked about the result of each: rows and columns of D."""
    products = list(tune_tiles.products(Context("cpu", "quick", [torch.float32]), torch.float32))
    assert [(p.direction, p.groups, p.rows, p.columns) for p in products] == [
        ("forward", 3, 8, 16), ("dgrad", 3, 8, 32), ("wgrad", 3, 16, 32),
    ]  # fmt: skip
    for product in products:
        assert product.run().shape[-2:] == (product.rows * (1 if product.direction == "wgrad" else 3), product.columns)
        errors: list[str] = []
        assert list(tune_tiles.usable(product, TILES, 1e-5, lambda run: run, errors)) == TILES and not errors


def test_compiled_tiles_are_listed():
    from moe_ext import _host

    names = [tile["name"] for tile in _host.sm90_tiles()]
    assert len(set(names)) == len(names)
    assert _host.choose_sm90_tile(8, 4096, 7168, 132) in names


def test_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="tune-tiles: no GPU"):
        bench.main(["tune-tiles"])
