"""moe_ext.integrations.transformers: every experts class of the installed transformers, whole models, compile, autocast."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch

from compare import relative_error
from moe_ext.integrations.transformers import fused_activation, register

transformers = pytest.importorskip("transformers", minversion="5.7")

INSTALLED = tuple(int(part) for part in transformers.__version__.split(".")[:2])
MODELS = Path(transformers.__file__).parent / "models"
# Whatever a configuration calls its sizes.
SMALL = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
}
NOT_FUSED = {"Inkling2Experts", "MuseSparkExperts"}
# Their own forward computes in float32, whatever the inputs.
FLOAT32 = {"BeamExperts", "Inkling2Experts", "MuseSparkExperts", "OpenAIPrivacyFilterExperts"}


def find_experts() -> list[tuple[str, str]]:
    """(module, class) of every class that carries use_experts_implementation."""
    found = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for match in re.finditer(r"^@use_experts_implementation.*\nclass (\w+)", file.read_text(), re.MULTILINE):
            found.append((f"transformers.models.{file.parent.name}.{file.stem}", match[1]))
    return found


EXPERTS = find_experts()


@pytest.fixture(autouse=True)
def registered():
    register()
    torch.manual_seed(0)


def make_experts(module: str, name: str) -> torch.nn.Module:
    """Tiny experts of this class, in float64; the configuration class is tried out where no annotation names it."""
    experts_class = getattr(importlib.import_module(module), name)
    configurations = importlib.import_module(module.replace("modeling_", "configuration_"))
    parameters = list(inspect.signature(experts_class.__init__.__wrapped__).parameters.values())[1:]
    classes = [
        c for n, c in vars(configurations).items() if n.endswith("Config") and c.__module__ == configurations.__name__
    ]
    failures = []
    for config_class in classes:
        try:
            config = config_class()
            for key, value in SMALL.items():
                if hasattr(config, key):
                    setattr(config, key, [value] * 2 if isinstance(getattr(config, key), list) else value)
            rest = [0 for p in parameters[1:] if p.default is p.empty]
            named = {p.name: SMALL[p.name] for p in parameters[1:] if p.name in SMALL}
            experts = experts_class(config, *rest, **named).double()
        except Exception as error:  # a configuration of another part of the model: of a vision tower, say
            failures.append(error)
            continue
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return experts
    raise AssertionError(f"{name}: no configuration of {classes} fits: {failures}")


def run(experts: torch.nn.Module, implementation: str, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, then gradients of hidden, weights and every parameter."""
    experts.config._experts_implementation = implementation
    hidden, ids, weights = (a.clone().requires_grad_(a.is_floating_point()) for a in arguments)
    output = experts(hidden, ids, weights)
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, [hidden, weights, *experts.parameters()], grad)]


def make_arguments(experts: torch.nn.Module, num_tokens: int = 9) -> list[torch.Tensor]:
    hidden_size = experts.down_proj.shape[2 if experts.is_transposed else 1]
    ids = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(num_tokens)])
    return [torch.randn(num_tokens, hidden_size).double(), ids, torch.rand(num_tokens, 2).double()]


def test_there_are_many():
    assert len(EXPERTS) >= (60 if INSTALLED >= (5, 23) else 30)


@pytest.mark.parametrize("module, name", EXPERTS, ids=[name for _, name in EXPERTS])
@pytest.mark.filterwarnings("ignore:.*without fusion")
def test_equals_eager(module, name):
    experts = make_experts(module, name)
    arguments = make_arguments(experts)
    bound = 1e-6 if name in FLOAT32 else 1e-12
    for ours, theirs in zip(run(experts, "moe_ext", arguments), run(experts, "eager", arguments), strict=True):
        assert relative_error(ours, theirs) < bound
    assert (fused_activation(experts) is None) == (name in NOT_FUSED)


def test_what_is_not_fused_says_so():
    pytest.importorskip("transformers.models.muse_spark")
    experts = make_experts("transformers.models.muse_spark.modeling_muse_spark", "MuseSparkExperts")
    with pytest.warns(UserWarning, match="MuseSparkExperts: it normalises each expert's output"):
        run(experts, "moe_ext", make_arguments(experts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(experts, "moe_ext", make_arguments(experts))  # known by now


def test_another_activation_of_the_same_class_is_noticed():
    experts = make_experts("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
    assert fused_activation(experts).name == "swiglu"
    experts.act_fn = torch.nn.GELU(approximate="tanh")
    assert fused_activation(experts).name == "geglu_tanh"
    experts.act_fn = torch.nn.PReLU().double()
    with pytest.warns(UserWarning, match="its activation is not one of moe_ext's"):
        assert fused_activation(experts) is None


def test_limited_swiglu_takes_the_modules_number():
    pytest.importorskip("transformers.models.deepseek_v4")
    experts = make_experts("transformers.models.deepseek_v4.modeling_deepseek_v4", "DeepseekV4Experts")
    experts.limit = 0.5
    found = fused_activation(experts)
    assert (found.name, found.gate_up_layout, found.limit) == ("swiglu_limited", "concatenated", 0.5)
    arguments = make_arguments(experts)
    for ours, theirs in zip(run(experts, "moe_ext", arguments), run(experts, "eager", arguments), strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_clamped_swiglu_takes_the_modules_numbers():
    experts = make_experts("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
    experts.alpha, experts.limit = 1.25, 0.5
    found = fused_activation(experts)
    assert (found.name, found.gate_up_layout, found.alpha, found.limit) == ("swiglu_clamped", "interleaved", 1.25, 0.5)
    arguments = make_arguments(experts)
    for ours, theirs in zip(run(experts, "moe_ext", arguments), run(experts, "eager", arguments), strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.filterwarnings("ignore:.*without fusion")
@pytest.mark.parametrize("module, name", [e for e in EXPERTS if e[1] in ("MixtralExperts", "DeepseekV4Experts")])
def test_expert_parallel_sentinels(module, name):
    """Index num_experts is an expert of another rank: no output, no gradient."""
    experts = make_experts(module, name)
    hidden, ids, weights = make_arguments(experts)
    ids[:3, 1] = experts.num_experts
    ids[5] = experts.num_experts
    output, grad_hidden, grad_weights, *_ = run(experts, "moe_ext", [hidden, ids, weights])
    weights[ids == experts.num_experts] = 0
    ids[ids == experts.num_experts] = 0  # older transformers' eager code knows no sentinels
    expected = run(experts, "eager", [hidden, ids, weights])[0]
    assert relative_error(output, expected) < 1e-12
    assert (output[5] == 0).all() and (grad_hidden[5] == 0).all() and (grad_weights[5] == 0).all()


def test_no_tokens():
    experts = make_experts("transformers.models.olmoe.modeling_olmoe", "OlmoeExperts")
    output, *grads = run(experts, "moe_ext", make_arguments(experts, num_tokens=3))
    assert output.shape == (3, 16) and all(g.isfinite().all() for g in grads)
    experts.config._experts_implementation = "moe_ext"
    empty = torch.zeros(0, 2)
    assert experts(torch.zeros(0, 16).double(), empty.long(), empty.double()).shape == (0, 16)


# ---- whole models

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS_TO_RUN = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Olmoe": {"intermediate_size": 24, "num_experts": 8},
    "Qwen3Moe": {"intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 8, "head_dim": 8},
    "Qwen2Moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 8},
    "DeepseekV3": {"intermediate_size": 24, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
                   "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                   "v_head_dim": 8, "num_key_value_heads": 4},
    "GptOss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
}  # fmt: skip


def make_model(name: str) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**TINY, **MODELS_TO_RUN[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", MODELS_TO_RUN)
def test_model_trains_and_generates_as_eager(name):
    model = make_model(name).double()
    ids = torch.randint(3, 64, (2, 11))
    results = []
    for implementation in ("eager", "moe_ext"):
        model.set_experts_implementation(implementation)
        loss = model(input_ids=ids, labels=ids).loss
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        results.append((loss, grads, tokens))
    (loss, grads, tokens), (our_loss, our_grads, our_tokens) = results
    assert relative_error(our_loss, loss) < 1e-6 and torch.equal(tokens, our_tokens)
    for ours, theirs in zip(our_grads, grads, strict=True):
        # Eager leaves None where no token came by; here such a gradient is zero.
        if ours is not None:
            assert relative_error(ours, torch.zeros_like(ours) if theirs is None else theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_eager(dtype):
    experts = make_experts("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts").to(dtype)
    arguments = [a.to(dtype) if a.is_floating_point() else a for a in make_arguments(experts, 64)]
    eager, ours = run(experts, "eager", arguments), run(experts, "moe_ext", arguments)
    exact = run(experts.double(), "eager", [a.double() if a.is_floating_point() else a for a in arguments])
    for got, plain, wide in zip(ours, eager, exact, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, wide) <= max(2 * relative_error(plain, wide), 4e-3)


def test_autocast():
    """fp32 weights under autocast: products in bf16, gradients and output in fp32."""
    experts = make_experts("transformers.models.mixtral.modeling_mixtral", "MixtralExperts").float()
    arguments = [a.float() if a.is_floating_point() else a for a in make_arguments(experts, 32)]
    exact = run(experts, "eager", arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(experts, "moe_ext", arguments)
        experts.config._experts_implementation = "moe_ext"
        in_bf16 = experts(arguments[0].bfloat16(), *arguments[1:])
    assert in_bf16.dtype == torch.bfloat16
    for got, wide in zip(results, exact, strict=True):
        assert got.dtype == torch.float32 and 1e-5 < relative_error(got, wide) < 2e-2


@pytest.mark.filterwarnings("ignore:.*without fusion")
@pytest.mark.parametrize("module, name", [e for e in EXPERTS if e[1] in ("GptOssExperts", "DeepseekV4Experts")])
def test_compiles_without_a_graph_break(module, name):
    """Also when the first call of the module is a compiled one, and with token counts that change."""
    experts = make_experts(module, name)
    experts.config._experts_implementation = "moe_ext"
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 8, 13):
        arguments = make_arguments(experts, num_tokens)
        assert relative_error(compiled(*arguments), experts(*arguments)) < 1e-12


def test_layers_of_one_class_compile_to_their_own_activations():
    """Found while compiling, each a constant of its own."""
    layers = [make_experts("transformers.models.mixtral.modeling_mixtral", "MixtralExperts") for _ in range(3)]
    layers[1].act_fn = torch.nn.GELU(approximate="tanh")
    for layer in layers:
        layer.config._experts_implementation = "moe_ext"
    arguments = make_arguments(layers[0])

    def both(hidden, ids, weights):
        for layer in layers[:2]:
            hidden = layer(hidden, ids, weights)
        return hidden

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*arguments), both(*arguments)) < 1e-12
    one = torch.compile(lambda layer, *a: layer(*a), fullgraph=True, backend="aot_eager")
    for layer in layers:
        assert relative_error(one(layer, *arguments), layer(*arguments)) < 1e-12


def test_attributes_of_later_versions_may_be_missing():
    """transformers 5.17 has no has_post_expert_norm."""
    experts = make_experts("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
    arguments = make_arguments(experts)
    expected = run(experts, "eager", arguments)
    vars(experts).pop("has_post_expert_norm", None)
    for act_fn in (experts.act_fn, torch.nn.PReLU().double()):
        experts.act_fn = act_fn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(experts, "moe_ext", arguments)
        if fused_activation(experts) is not None:
            assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def test_older_transformers_are_named(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.6.2")
    with pytest.raises(ImportError, match=r"transformers 5\.7 or later is needed, found 5\.6\.2"):
        register()


def test_register_twice():
    register()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "moe_ext" in ALL_EXPERTS_FUNCTIONS
