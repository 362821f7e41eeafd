"""moe_ext: mixture-of-experts kernels for PyTorch."""

from moe_ext._library import build_info
from moe_ext.ops.permutation import permute, unpermute

__version__ = "0.1.0"

__all__ = ["build_info", "permute", "unpermute"]
