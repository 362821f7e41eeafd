"""Names for the parents of the processes that use a GPU, which import neither torch nor moe_ext themselves: a library
that does not load must cost a step, not the verdict."""

from __future__ import annotations

TILE_VARIABLE = "MOE_EXT_SM90_TILE"  # forces a tile: csrc/grouped_gemm/tile_choice.h
CHOSEN_TILES = ("128x256", "128x128", "64x256")  # those that the cost model there takes
TILES = (*CHOSEN_TILES, "128x256x2")
CUTLASS_TILE = "cutlass_128x256"
PRODUCTS = {tile: f"products-{tile}" for tile in TILES} | {CUTLASS_TILE: "products-cutlass"}
LAYERS = {tile: f"layer-{tile}" for tile in TILES}
SMOKE_PIECES = ("gates", "products-float32", *PRODUCTS.values(), *LAYERS.values(), "products-float16",
                "layers-float32", "layers-bfloat16", "layers-float16")  # fmt: skip
