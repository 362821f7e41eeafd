"""The tile sweep with made-up tiles and a made-up clock: what is forced, what is written, what the table says."""

from __future__ import annotations

import json
import os

import pytest
import torch

from bench import __main__ as bench
from bench import report, tune_tiles
from bench.case import Context
from bench.timing import Timing
from bench.tune_tiles import TILE_VARIABLE, Product, Tiles

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

        return Product(f"rows {rows}", "forward", run, 8, rows, 64, flops=2e12)

    def time(self, contenders):
        timings = {}
        for name, run in contenders.items():
            run()
            self.seen.append((name, self.now))
            timings[name] = Timing(SECONDS[self.rows][self.now], 0.0, 1)
        return timings


@pytest.fixture
def rows() -> list[dict]:
    clock = Clock()
    tiles = Tiles(TILES, lambda groups, rows, columns: "large" if rows * columns > 4096 * 32 else "tall")
    result = tune_tiles.sweep(iter([clock.product(4096), clock.product(16)]), tiles, clock.time, 0.0, lambda run: run)
    assert clock.seen == [(tile, tile) for _ in range(2) for tile in TILES]
    return result


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


def test_a_tile_that_computes_something_else_is_refused():
    def run() -> torch.Tensor:
        return torch.full((4,), 2.0 if os.environ.get(TILE_VARIABLE) == "small" else 1.0)

    product = Product("x", "forward", run, 1, 1, 1, 1.0)
    with pytest.raises(AssertionError, match="tile small differs by 1"):
        tune_tiles.sweep(iter([product]), Tiles(TILES, lambda *_: "large"), lambda _: {}, 1e-3, lambda run: run)


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
        tune_tiles.check(product, TILES, 0.0)


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
