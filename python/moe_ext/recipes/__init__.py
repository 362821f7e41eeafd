"""Published mixture-of-experts systems, each in one short file over :mod:`moe_ext.nn`.

A recipe says what a system is, not how it is computed:

- One file per system, ``recipes/<system>.py``, 20 to 80 lines; its public class or function carries the system's own
  name (``EMoE``, ``CLIPMoE``) and is exported here.
- The docstring of the file cites the paper (title, arXiv number), gives the mechanism as a formula, and marks as "our
  reading" what the paper leaves open.
- A layer is a subclass of :class:`moe_ext.nn.MoE` that only fills in the parts: a router (any module from rows to
  logits, and the knobs of :func:`moe_ext.topk_gating`), one or more groups of experts, a shared expert, weights of the
  balance loss. Its forward takes ``hidden`` and, where the system needs it, what else the router or the gate looks at;
  it returns :class:`moe_ext.nn.MoEOutput`. Sizes come first, in the order ``hidden_size, intermediate_size,
  num_experts, topk``; the paper's own settings are the defaults of what follows.
- What makes such a layer out of a trained model is a function of modules to modules, from :mod:`moe_ext.nn.transforms`.
- No loop over experts, no host sync, no autograd formula. What two systems need is a primitive of :mod:`moe_ext.nn`,
  and a primitive that no recipe uses does not exist (``tests/recipes/test_conventions.py``).
- ``tests/recipes/test_<system>.py`` holds the recipe against the paper's formula, written out in plain torch in
  float64, forward and backward.
"""

from moe_ext.recipes.aw_moe import AWMoE
from moe_ext.recipes.btm import average_parameters, cached_log_prior, domain_posterior, ensemble
from moe_ext.recipes.feamoe import FEAMOE
from moe_ext.recipes.mdcs import MDCS
from moe_ext.recipes.moe_fusion import MoEFusion, MoEVRD
from moe_ext.recipes.mousi import MouSiFusion
from moe_ext.recipes.pmoe import PMOE
from moe_ext.recipes.switch_dit import SwitchDiTBlock
from moe_ext.recipes.tame import TAME
from moe_ext.recipes.task_expert import TaskExpert

__all__ = [
    "FEAMOE",
    "MDCS",
    "PMOE",
    "TAME",
    "AWMoE",
    "MoEFusion",
    "MoEVRD",
    "MouSiFusion",
    "SwitchDiTBlock",
    "TaskExpert",
    "average_parameters",
    "cached_log_prior",
    "domain_posterior",
    "ensemble",
]
