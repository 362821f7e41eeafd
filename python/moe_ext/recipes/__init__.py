"""Published mixture-of-experts systems, each in one short file over :mod:`moe_ext.nn`.

A recipe says what a system is, not how it is computed:

- One file per system, ``recipes/<system>.py``, under 100 lines; its public class or function carries the system's own
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
from moe_ext.recipes.bam import BAM
from moe_ext.recipes.bigmac import BigMac
from moe_ext.recipes.btm import btm_average, btm_ensemble, btm_log_prior, btm_posterior
from moe_ext.recipes.clip_moe import CLIPMoE, upcycle_clip
from moe_ext.recipes.cmoe import CMoE
from moe_ext.recipes.deepseek_moe import DeepSeekMoE, DeepSeekV2MoE, DeepSeekV3MoE
from moe_ext.recipes.emoe import EMoE
from moe_ext.recipes.ewa import EWA
from moe_ext.recipes.expertflow import RoutePredictor, compare_caches, run_regrouped
from moe_ext.recipes.factor_llm import FactorLLM
from moe_ext.recipes.feamoe import FEAMOE
from moe_ext.recipes.fsmoe import FSMoE
from moe_ext.recipes.glider import GLIDER
from moe_ext.recipes.llava_mole import LLaVAMoLE
from moe_ext.recipes.loramoe import LoRAMoE, LoRAMoEOutput, loramoe_loss
from moe_ext.recipes.mc_moe import allocate_bits, compress_experts, compression_costs, prune_routing
from moe_ext.recipes.mdcs import MDCS
from moe_ext.recipes.mentor import MENTOR, mentor_loss
from moe_ext.recipes.mixlora import MixLoRA
from moe_ext.recipes.moe_fusion import MoEFusion, MoEVRD
from moe_ext.recipes.moe_plus_plus import MoEPlusPlus
from moe_ext.recipes.moextend import MoExtend, layers_to_extend
from moe_ext.recipes.moirai_moe import MoiraiMoE
from moe_ext.recipes.mola import MoLA, apply_mola, experts_per_layer
from moe_ext.recipes.mote import activation_difference, suppress_experts
from moe_ext.recipes.mousi import MouSiFusion
from moe_ext.recipes.phatgoose import PHATGOOSE, PHATGOOSEGate
from moe_ext.recipes.pill import PILLAdapters, PILLValueGate
from moe_ext.recipes.pmoe import PMOE
from moe_ext.recipes.post_moe import PostMoE
from moe_ext.recipes.rocket import Rocket, select_experts
from moe_ext.recipes.scmoe import random_routing, self_contrast, weak_routing
from moe_ext.recipes.smora import SMoRA
from moe_ext.recipes.sparsely_gated_moe import SparselyGatedMoE
from moe_ext.recipes.switch_dit import SwitchDiTBlock
from moe_ext.recipes.switch_transformer import SwitchTransformer
from moe_ext.recipes.tame import TAME
from moe_ext.recipes.task_expert import TaskExpert
from moe_ext.recipes.task_level_moe import TaskLevelMoE
from moe_ext.recipes.twin_merging import TwinMerging

__all__ = [
    "BAM",
    "EWA",
    "FEAMOE",
    "GLIDER",
    "MDCS",
    "MENTOR",
    "PHATGOOSE",
    "PMOE",
    "TAME",
    "AWMoE",
    "BigMac",
    "CLIPMoE",
    "CMoE",
    "DeepSeekMoE",
    "DeepSeekV2MoE",
    "DeepSeekV3MoE",
    "EMoE",
    "FSMoE",
    "FactorLLM",
    "LLaVAMoLE",
    "LoRAMoE",
    "LoRAMoEOutput",
    "MixLoRA",
    "MoEFusion",
    "MoEPlusPlus",
    "MoEVRD",
    "MoExtend",
    "MoLA",
    "MoiraiMoE",
    "MouSiFusion",
    "PHATGOOSEGate",
    "PILLAdapters",
    "PILLValueGate",
    "PostMoE",
    "Rocket",
    "RoutePredictor",
    "SMoRA",
    "SparselyGatedMoE",
    "SwitchDiTBlock",
    "SwitchTransformer",
    "TaskExpert",
    "TaskLevelMoE",
    "TwinMerging",
    "activation_difference",
    "allocate_bits",
    "apply_mola",
    "btm_average",
    "btm_ensemble",
    "btm_log_prior",
    "btm_posterior",
    "compare_caches",
    "compress_experts",
    "compression_costs",
    "experts_per_layer",
    "layers_to_extend",
    "loramoe_loss",
    "mentor_loss",
    "prune_routing",
    "random_routing",
    "run_regrouped",
    "select_experts",
    "self_contrast",
    "suppress_experts",
    "upcycle_clip",
    "weak_routing",
]
