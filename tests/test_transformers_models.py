"""Whole causal language models of transformers, tiny: loss, logits and every gradient equal those of its eager code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compare import relative_error
from moe_ext.integrations import transformers as integration

transformers = pytest.importorskip("transformers", minversion="5.7")

# Whatever a configuration calls its sizes.
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "block_ffn_hidden_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **{"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2},
}  # fmt: skip
MODELS = [
    "AXK1", "AXK2", "Afmoe", "AriaText", "Cohere2Moe", "DeepseekV3", "DeepseekV32", "DeepseekV4", "Ernie4_5_Moe",
    "ExaoneMoe", "FlexOlmo", "Glm4Moe", "Glm4MoeLite", "GlmMoeDsa", "GptOss", "GraniteMoe", "GraniteMoeSWA",
    "GraniteMoeShared", "HYV3", "HYV4", "Kolibri1", "Laguna", "Mellum", "MiniMax", "MiniMaxM2", "MiniMaxM3VL", "Mixtral",
    "Olmoe", "Phimoe", "Qwen2Moe", "Qwen3Moe", "SolarOpen",
]  # fmt: skip


def make_model(name: str) -> nn.Module:
    """The model with whatever of SIZES its configuration has, and experts whose share in the output is large."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    known = model_class.config_class()
    changes = {key: value for key, value in SIZES.items() if getattr(known, key, None) is not None}
    if kinds := list(getattr(known, "layer_types", None) or []):
        changes["layer_types"] = list(dict.fromkeys(kinds))[:2] if len(set(kinds)) > 1 else kinds[:2]
    model = model_class(model_class.config_class(**changes)).eval()
    for module in find_experts(model):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def find_experts(model: nn.Module) -> list[nn.Module]:
    """By what use_experts_implementation gives a class."""
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def run(model: nn.Module, implementation: str, ids: Tensor) -> list[Tensor | None]:
    """Loss, logits, and the gradient of every parameter, None for one that took no part."""
    model.set_experts_implementation(implementation)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [output.loss, output.logits, *torch.autograd.grad(output.loss, trained, allow_unused=True)]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Classes of the experts that moe_ext ran."""
    found: list[str] = []
    forward: Callable[..., Tensor] = integration.experts_forward

    def counted(experts: nn.Module, *arguments: Tensor) -> Tensor:
        found.append(type(experts).__name__)
        return forward(experts, *arguments)

    monkeypatch.setattr(integration, "experts_forward", counted)
    integration.register()
    yield found
    monkeypatch.undo()
    integration.register()


def test_there_are_thirty():
    assert len(MODELS) >= 30


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_eager(name, calls, device):
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    dtype, bound = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 1e-3)
    model = make_model(name).to(device, dtype)
    if not find_experts(model):
        pytest.skip(f"the experts of transformers {transformers.__version__}'s {name} take no other implementation")
    ids = torch.randint(3, 64, (2, 9), device=device)
    expected = run(model, "eager", ids)
    assert not calls
    found = run(model, "moe_ext", ids)
    assert calls
    # A gradient that is zero but for rounding has no relative error; eager leaves None where no token came by.
    largest = max(g.norm().item() for g in expected[2:] if g is not None)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is not None:
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            assert (ours - theirs).norm() <= bound * max(theirs.norm().item(), 1e-4 * largest)
    assert relative_error(found[1], expected[1]) < bound
