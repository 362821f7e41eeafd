"""BAM: N identical copies are the dense parallel block; size of the cache; the formula expert by expert."""

from __future__ import annotations

import pytest
import torch
from formulas import all_outputs, assert_same, keep_topk, mixture, rows
from torch.nn import functional as F

from compare import relative_error
from moe_ext.recipes import BAM

HIDDEN, HEADS, EXPERTS = 12, 3, 4


def attend(x, query, key, value, output):
    """Causal attention of one expert, head by head."""
    heads = []
    for q, k, v in zip(*((x @ w.T).chunk(HEADS, dim=-1) for w in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / (HIDDEN // HEADS) ** 0.5
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        heads.append(torch.softmax(scores.masked_fill(ahead, float("-inf")), dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ output.T


@pytest.mark.parametrize("shared_kv", [False, True])
def test_formula(shared_kv, backend):
    block = BAM(HIDDEN, 8, EXPERTS, 2, num_heads=HEADS, shared_kv=shared_kv, backend=backend).double()
    hidden = rows(2, 5, HIDDEN)
    x = F.layer_norm(hidden, (HIDDEN,), block.norm.weight, block.norm.bias)
    gates = torch.softmax(x @ block.attention_gate.weight.T, dim=-1)
    queries = block.attention.query.weight.chunk(EXPERTS)
    keys, values = (w.chunk(1 if shared_kv else EXPERTS) for w in block.attention.key_value.weight.chunk(2))
    outputs = block.attention.output.weight.chunk(EXPERTS, dim=1)
    expected = hidden
    for e in range(EXPERTS):
        kv = 0 if shared_kv else e
        expected = expected + gates[..., e : e + 1] * attend(x, queries[e], keys[kv], values[kv], outputs[e])
    flat = x.view(10, HIDDEN)
    weights = keep_topk(torch.softmax(flat @ block.moe.router.logits.weight.T, dim=-1), 2, renormalize=True)
    expected = expected + mixture(all_outputs(block.moe.experts, flat), weights).view(2, 5, HIDDEN)
    assert_same([block(hidden).hidden], [expected], [hidden, *block.parameters()])
    assert block.attention.key_value.out_features == 2 * HIDDEN * (1 if shared_kv else EXPERTS)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_identical_copies_are_the_dense_block(shared_kv):
    block = BAM(HIDDEN, 8, EXPERTS, 2, num_heads=HEADS, shared_kv=shared_kv).double()
    attention, experts = block.attention, block.moe.experts
    query, output = attention.query.weight.data[:HIDDEN].clone(), attention.output.weight.data[:, :HIDDEN].clone()
    key, value = (w[:HIDDEN].clone() for w in attention.key_value.weight.data.chunk(2))
    with torch.no_grad():
        attention.query.weight.copy_(query.repeat(EXPERTS, 1))
        attention.output.weight.copy_(output.repeat(1, EXPERTS))
        copies = attention.kv_experts
        attention.key_value.weight.copy_(torch.cat([key.repeat(copies, 1), value.repeat(copies, 1)]))
        for weight in experts.parameters():
            weight.copy_(weight[0].clone().expand_as(weight))
    hidden = rows(2, 5, HIDDEN)
    x = block.norm(hidden)
    dense = (
        hidden + attend(x, query, key, value, output) + all_outputs(experts, x.view(10, HIDDEN))[0].view(2, 5, HIDDEN)
    )
    assert relative_error(block(hidden).hidden, dense) < 1e-12
