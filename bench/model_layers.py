"""What the mixture-of-experts layers of a model would cost here: sizes from its Hugging Face ``config.json``.

The experts are timed as SwiGLU (gpt-oss's: as its own); router, shared experts and attention are no part of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .case import Case, Cases, Context
from .layers import Layer
from .shapes import LayerShape

# The names that configurations have for one size; the first that holds a number counts.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_routed_experts")
TOPK = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "topk")
INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size", "ffn_dim")
HIDDEN = ("hidden_size", "d_model", "n_embd")
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
FIRST_DENSE = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
INNER = ("text_config", "llm_config", "language_config", "thinker_config")


class ModelLayers(NamedTuple):
    """The layers of one model that hold experts."""

    shape: LayerShape  # of one token
    num_layers: int


def read_config(path: Path) -> ModelLayers:
    """From a ``config.json``, or the folder that holds one; raises SystemExit naming the size that is missing."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: expected a config.json of a model: {error}") from None
    name = str(config.get("model_type") or path.resolve().parent.name)
    return from_config(config, name, str(path))


def from_config(config: dict[str, Any], name: str, source: str = "config") -> ModelLayers:
    """Sizes, and which layers hold experts, of a configuration as transformers writes it."""
    for inner in INNER:
        if isinstance(config.get(inner), dict):
            return from_config(config[inner], name, source)

    def size(names: tuple[str, ...]) -> int:
        for key in names:
            value = config.get(key)
            if isinstance(value, list) and value:
                value = value[0]  # one for each layer
            if isinstance(value, int) and value > 0:
                return value
        raise SystemExit(f"{source}: expected one of {', '.join(names)} with a number, found none")

    experts, topk = size(EXPERTS), size(TOPK)
    gpt_oss = config.get("model_type") == "gpt_oss" or "swiglu_limit" in config
    shape = LayerShape(name, 1, size(HIDDEN), size(INTERMEDIATE), experts, topk, gpt_oss)
    layers = [index for index in range(size(LAYERS)) if _has_experts(config, index)]
    if not layers:
        raise SystemExit(f"{source}: expected layers with experts, found none")
    return ModelLayers(shape, len(layers))


def _has_experts(config: dict[str, Any], index: int) -> bool:
    if index < next((config[key] for key in FIRST_DENSE if isinstance(config.get(key), int)), 0):
        return False
    if index > config.get("moe_layer_end_index", index) or index in (config.get("mlp_only_layers") or ()):
        return False
    listed = config.get("moe_layers")
    if isinstance(listed, list) and index not in listed:
        return False
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and index < len(kinds) and kinds[index] == "dense":
        return False
    if config.get("expert_layer_period"):
        return index % config["expert_layer_period"] == config.get("expert_layer_offset", 0)
    # Every n-th layer, counted from one.
    step = next((config[key] for key in ("decoder_sparse_step", "interleave_moe_layer_step") if config.get(key)), 1)
    if (index + 1) % step:
        return False
    period = config.get("moe_layer_freq") or config.get("moe_layer_interval") or 1
    return bool(period[index]) if isinstance(period, list) else index % period == 0


def weight_bytes(shape: LayerShape, dtype: torch.dtype) -> int:
    """Of one layer: three matrices for each expert."""
    return 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size * dtype.itemsize


def check_memory(shape: LayerShape, dtype: torch.dtype, device: str, *, backward: bool) -> None:
    """Raises SystemExit where weights, and their gradients, of one layer do not fit what is free."""
    needed = weight_bytes(shape, dtype) * (3 if backward else 1) * 5 // 4
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), needed)
    if needed > free:
        raise SystemExit(f"{shape.name}: a layer in {str(dtype).removeprefix('torch.')} needs about "
                         f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")  # fmt: skip


def cases(context: Context, layers: ModelLayers, tokens: list[int], *, backward: bool) -> Cases:
    for dtype in context.dtypes:
        check_memory(layers.shape, dtype, context.device, backward=backward)
        for num_tokens in tokens:
            shape = layers.shape.with_tokens(num_tokens)
            layer = Layer(context, shape, dtype, "uniform")
            name, moved = f"{shape.name} T={num_tokens}", float(layer.used_weight_bytes)
            runs = {peer: layer.forward(peer) for peer in layer.contenders}
            yield Case("moe_mlp", "model", name, dtype, "uniform", "forward", runs.pop("ours"), runs,
                       skipped_peers=layer.skipped, flops=shape.forward_flops, bytes=moved,
                       read_bytes=moved if num_tokens <= 64 else 0.0)  # fmt: skip
            if backward:
                steps = layer.steps()
                yield Case("moe_mlp_backward", "model", name, dtype, "uniform", "forward+backward", steps.pop("ours"),
                           steps, skipped_peers={**layer.skipped, **layer.skipped_backward},
                           flops=3.0 * shape.forward_flops, bytes=3 * moved)  # fmt: skip


def summary(layers: ModelLayers, rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table: tokens, dtype, direction, one layer, all layers, per token, tokens per second."""
    from .report import time_text

    lines = []
    for row in rows:
        tokens = int(row["shape"].rsplit("T=", 1)[1])
        model = row["seconds"] * layers.num_layers
        row["model_layers"], row["model_seconds_per_token"] = layers.num_layers, model / tokens
        lines.append((str(tokens), row["dtype"], row["direction"], time_text(row["seconds"]), time_text(model),
                      time_text(model / tokens), f"{tokens / model:.3g}"))  # fmt: skip
    return lines
