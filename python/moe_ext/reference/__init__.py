"""Pure-Python twins of every op: same name, same arguments, plain torch, differentiable by autograd.

They are the specification: tests compare each kernel with its twin.
"""

from moe_ext.reference.permutation import permute, unpermute
from moe_ext.reference.plan import routing_plan

__all__ = ["permute", "routing_plan", "unpermute"]
