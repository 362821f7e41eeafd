"""Layer shapes of published models, and the tables of the benchmark."""

from __future__ import annotations

from typing import NamedTuple


class LayerShape(NamedTuple):
    """One mixture-of-experts layer: T tokens, H hidden size, I intermediate size, E experts, K of them per token.

    The experts are SwiGLU without biases, or with ``gpt_oss`` its clamped and interleaved SwiGLU with biases.
    """

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    topk: int
    gpt_oss: bool = False

    @property
    def forward_flops(self) -> int:
        """SwiGLU experts: three products of 2 * T * K * H * I."""
        return 6 * self.num_tokens * self.topk * self.hidden_size * self.intermediate_size

    def with_tokens(self, num_tokens: int) -> LayerShape:
        return self._replace(num_tokens=num_tokens)


# hidden_size, intermediate_size, num_experts, topk from the models' configurations.
MIXTRAL = LayerShape("mixtral-8x7b", 8192, 4096, 14336, 8, 2)
OLMOE = LayerShape("olmoe-1b-7b", 32768, 2048, 1024, 64, 8)
QWEN3_30B = LayerShape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8)
QWEN3_NEXT = LayerShape("qwen3-next", 32768, 2048, 512, 512, 10)
DEEPSEEK_V3 = LayerShape("deepseek-v3", 8192, 7168, 2048, 256, 8)
DEEPSEEK_V3_EP8 = LayerShape("deepseek-v3-ep8-slice", 8192, 7168, 2048, 32, 8)
DEEPSEEK_V2_LITE = LayerShape("deepseek-v2-lite", 32768, 2048, 1408, 64, 6)
GPT_OSS_20B = LayerShape("gpt-oss-20b", 16384, 2880, 2880, 32, 4, gpt_oss=True)
FINE_GRAINED = [
    LayerShape("fine-1024x128", 32768, 4096, 1024, 128, 8),
    LayerShape("fine-256x256", 32768, 4096, 256, 256, 16),
    LayerShape("fine-1536", 24576, 1536, 256, 128, 8),
]

# The layer table (A) and the decode table (D) on a GPU.
GPU_LAYERS = [
    *FINE_GRAINED,
    MIXTRAL,
    OLMOE,
    *(QWEN3_30B.with_tokens(t) for t in (2048, 8192, 32768)),
    QWEN3_NEXT,
    DEEPSEEK_V3,
    DEEPSEEK_V3_EP8,
    GPT_OSS_20B,
]
GPU_DECODE = [s.with_tokens(t) for s in (QWEN3_30B, DEEPSEEK_V3_EP8) for t in (1, 4, 16, 64, 256)]
# GEMM only (B), beside the up and down projections of the layers: groups, rows per group, N, K.
GPU_GEMMS = [
    (groups, rows, n, k)
    for groups, rows in ((4, 8192), (8, 4096))
    for n, k in ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
]

# Two cores: the same layers with fewer tokens, and a Mixtral of a quarter of the width.
CPU_LAYERS = [OLMOE.with_tokens(512), LayerShape("mixtral-quarter", 512, 1024, 3584, 8, 2)]
CPU_DECODE = [OLMOE.with_tokens(t) for t in (1, 16)]
# The profile cpu-full has these as well: half of the width of gpt-oss, and a layer of a small byte-level model.
CPU_FULL_LAYERS = [
    *CPU_LAYERS,
    QWEN3_30B.with_tokens(512),
    DEEPSEEK_V2_LITE.with_tokens(512),
    LayerShape("gpt-oss-half", 512, 1440, 1440, 32, 4, gpt_oss=True),
    LayerShape("byte-lm", 1024, 256, 512, 16, 2),
]
CPU_FULL_DECODE = [*CPU_DECODE, OLMOE.with_tokens(4), QWEN3_30B.with_tokens(1)]
CPU_GEMMS = [(8, 64, 1024, 1024), (64, 8, 1024, 1024)]

# Routers (C): name, num_experts, topk.
ROUTERS = [("qwen3-30b-a3b", 128, 8), ("deepseek-v3", 256, 8), ("kimi-k2", 384, 8), ("qwen3-next", 512, 10)]

TINY_LAYERS = [LayerShape("tiny", 48, 32, 16, 6, 2)]
TINY_FULL_LAYERS = [*TINY_LAYERS, LayerShape("tiny-gpt-oss", 48, 32, 16, 6, 2, gpt_oss=True)]


class Sweep(NamedTuple):
    """The scaling table: one layer, of which one size at a time is varied."""

    layer: LayerShape
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    threads_at_tokens: tuple[int, ...]  # where fewer threads than all are tried too, on a CPU


SWEEPS = {
    "cpu": Sweep(LayerShape("sweep", 1024, 512, 256, 64, 8), (1, 4, 16, 64, 256, 1024, 4096, 8192),
                 (8, 16, 32, 64, 128, 256, 512), (1, 64, 1024)),
    "gpu": Sweep(LayerShape("sweep", 4096, 2048, 768, 128, 8), (1, 4, 16, 64, 256, 1024, 4096, 8192),
                 (8, 16, 32, 64, 128, 256, 512), ()),
    "quick": Sweep(LayerShape("sweep", 16, 32, 16, 8, 2), (1, 16), (4, 8), (16,)),
}  # fmt: skip
