"""mypy --strict of a user's program against the package as it is installed: the right one passes, the wrong one does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_ext

RIGHT = """
import torch
from torch import Tensor

import moe_ext
from moe_ext import RoutingPlan
from moe_ext.distributed import DispatchOptions, FlatExchange
from moe_ext.integrations.grouped_mm import grouped_mm
from moe_ext.integrations.megablocks import gmm
from moe_ext.integrations.transformer_engine import moe_permute
from moe_ext.integrations.transformers import register
from moe_ext.nn import ExpertParallelMoE, Experts, MoE, MoELayer, MoEOutput, TopKRouter
from moe_ext.recipes.switch_transformer import SwitchTransformer


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MoELayer(32, 48, num_experts=8, topk=2, capacity_factor=1.25, router={"renormalize": True})
        self.parts = MoE(TopKRouter(32, 8, 2), Experts(8, 32, 48, activation="geglu"))

    def forward(self, hidden: Tensor) -> Tensor:
        output: MoEOutput = self.layer(hidden)
        return output.hidden + output.balance_loss


def mlp(hidden: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    weights, ids = moe_ext.topk_gating(logits, 2, score_function="sigmoid", renormalize=True)
    plan: RoutingPlan = moe_ext.routing_plan(ids, 8)
    rows = moe_ext.permute(hidden, plan.permuted_to_slot, plan.slot_to_permuted, topk=2)
    product = moe_ext.grouped_gemm(rows, gate_up, plan.expert_offsets, weight_layout="enk")
    balance_loss, z_loss, load = moe_ext.router_losses(logits, ids)
    output = moe_ext.moe_mlp(hidden, gate_up, down, plan, weights, weight_layout="enk")
    return output.sum() + product.sum() + balance_loss + z_loss + load.sum()


def layer_of_rank() -> ExpertParallelMoE:
    return ExpertParallelMoE(32, 48, 8, 2, FlatExchange(), dispatch=DispatchOptions(form="dedup"), degree=2)


def others(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    register()
    rows, row_id_map = moe_permute(a, offs, map_type="index")
    return grouped_mm(rows, b, offs=offs) + gmm(a, b, offs, trans_b=True)


switch = SwitchTransformer(32, 48, 8)
version: object = moe_ext.build_info()["version"]
"""

# Each line is wrong in the way that the comment says, in the words of mypy.
WRONG = """
import torch
import moe_ext
from moe_ext.distributed import DispatchOptions, FlatExchange
from moe_ext.integrations.grouped_mm import grouped_mm
from moe_ext.nn import Experts, ExpertParallelMoE, MoELayer, TopKRouter

x = torch.zeros(4, 8)
moe_ext.topk_gating(x, "2")  # arg-type
moe_ext.topk_gating(x, 2, score_function="tanh")  # arg-type
moe_ext.routing_plan(x, 8).offsets  # attr-defined
moe_ext.moe_mlp(x, x, x, x, weight_layout="enk")  # arg-type
moe_ext.moe_mlp(x, x, x, moe_ext.routing_plan(x, 8))  # call-arg
moe_ext.grouped_gem(x, x, x)  # attr-defined
MoELayer(32, 48, 8)  # call-arg
MoELayer(32, 48, 8, 2, activation="relu")  # call-arg
Experts(8, 32, 48, backend="cuda")  # arg-type
TopKRouter(32, 8, 2, logits=x)  # arg-type
DispatchOptions(form="dedupe")  # arg-type
ExpertParallelMoE(32, 48, 8, 2)  # call-arg
grouped_mm(x, x, x)  # call-arg
answer: int = moe_ext.permute(x, x, x, topk=2)  # assignment
"""


def test_strict_mypy_of_a_users_program(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed (requirements/dev.txt)")
    package = Path(moe_ext.__file__).resolve().parent
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(RIGHT)
    wrong.write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run(
        [*command, right.name, wrong.name],
        env={**os.environ, "PYTHONPATH": str(package.parent)},  # to mypy, a folder of installed packages
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = sorted(
        (int(line), code) for line, code in re.findall(r"^wrong\.py:(\d+): error:.*\[([a-z-]+)\]$", run.stdout, re.M)
    )
    expected = [(i, line.split("# ")[1]) for i, line in enumerate(WRONG.splitlines(), 1) if "  # " in line]
    assert "right.py" not in run.stdout and "installed" not in run.stdout, run.stdout + run.stderr
    assert found == expected, run.stdout
