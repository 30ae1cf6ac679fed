"""Floor 4: layers as ordinary modules, with explicit state in and out."""

from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.mlp import SwiGLU
from gdn_ops.nn.norm import GatedRMSNorm, RMSNorm
from gdn_ops.nn.padding import Padding
from gdn_ops.nn.rotary import rotate
from gdn_ops.nn.sliding_window_attention import SlidingWindowAttention

__all__ = ["GatedDeltaNet", "GatedRMSNorm", "Padding", "RMSNorm", "SlidingWindowAttention", "SwiGLU", "rotate"]
