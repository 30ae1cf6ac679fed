"""Floor 4: layers as ordinary modules, with explicit state in and out."""

from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.loss import linear_cross_entropy
from gdn_ops.nn.mamba2 import Mamba2
from gdn_ops.nn.mlp import SwiGLU
from gdn_ops.nn.norm import GatedGroupRMSNorm, GatedRMSNorm, RMSNorm
from gdn_ops.nn.padding import Padding
from gdn_ops.nn.rotary import rotate
from gdn_ops.nn.sliding_window_attention import SlidingWindowAttention

__all__ = [
    "GatedDeltaNet",
    "GatedGroupRMSNorm",
    "GatedRMSNorm",
    "Mamba2",
    "Padding",
    "RMSNorm",
    "SlidingWindowAttention",
    "SwiGLU",
    "linear_cross_entropy",
    "rotate",
]
