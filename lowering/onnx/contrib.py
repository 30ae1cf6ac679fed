"""Bodies for ONNX Runtime's fused operators, so that a file that names them runs where there is no such kernel.

They compute what this package's own nodes ask for, not everything that the operators can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ops.lowering.onnx.function import CONTRIB, DOMAIN, function

if TYPE_CHECKING:
    from onnx import FunctionProto

_LINEAR_ATTENTION = """
  one = Constant <value_ints = [1]> ()
  H0 = Constant <value_int: int = @q_num_heads> ()
  HV0 = Constant <value_int: int = @kv_num_heads> ()
  H = Reshape (H0, one)
  HV = Reshape (HV0, one)
  B = Shape <start = 0, end = 1> (query)
  T = Shape <start = 1, end = 2> (query)
  HK = Shape <start = 2, end = 3> (query)
  HVV = Shape <start = 2, end = 3> (value)
  K = Div (HK, H)
  V = Div (HVV, HV)
  qk_shape = Concat <axis = 0> (B, T, H, K)
  v_shape = Concat <axis = 0> (B, T, HV, V)
  q = Reshape <allowzero = 1> (query, qk_shape)
  k = Reshape <allowzero = 1> (key, qk_shape)
  v = Reshape <allowzero = 1> (value, v_shape)
  o, present_state = gdn_ops.GatedDeltaRule <scale: float = @scale> (q, k, v, decay, beta, past_state)
  o_shape = Concat <axis = 0> (B, T, HVV)
  output = Reshape <allowzero = 1> (o, o_shape)
"""


def linear_attention() -> FunctionProto:
    """``com.microsoft::LinearAttention`` as this package writes it: ``gated_delta``, fp32, every input there."""
    signature = (
        "LinearAttention <q_num_heads, kv_num_heads, scale, update_rule> "
        "(query, key, value, past_state, decay, beta) => (output, present_state)"
    )
    return function(signature, _LINEAR_ATTENTION, CONTRIB, (DOMAIN,))


_GATED_DELTA_NET = """
  q = Cast <to = 1> (query)
  k = Cast <to = 1> (key)
  v = Cast <to = 1> (value)
  before = Transpose <perm = [0, 1, 3, 2]> (initial_state)
  o, after = gdn_ops.GatedDeltaRule <scale: float = @scale> (q, k, v, decay, beta, before)
  output = CastLike (o, query)
  final_state = Transpose <perm = [0, 1, 3, 2]> (after)
"""


def gated_delta_net() -> FunctionProto:
    """``com.microsoft::GatedDeltaNet`` as this package writes it: rows of equal length, fp32 gates, no activations."""
    signature = (
        "GatedDeltaNet <scale> (query, key, value, cu_seqlens, decay, beta, initial_state) => (output, final_state)"
    )
    return function(signature, _GATED_DELTA_NET, CONTRIB, (DOMAIN,))


_CAUSAL_CONV_WITH_STATE = """
  one = Constant <value_ints = [1]> ()
  taps = Squeeze (weight, one)
  before = Transpose <perm = [0, 2, 1]> (past_state)
  output, after = gdn_ops.CausalConv1d <silu = 0> (input, taps, bias, before)
  present_state = Transpose <perm = [0, 2, 1]> (after)
"""


def causal_conv_with_state() -> FunctionProto:
    """``com.microsoft::CausalConvWithState`` as this package writes it: channels last, no activation."""
    signature = (
        "CausalConvWithState <channels_last, activation> (input, weight, bias, past_state) => (output, present_state)"
    )
    return function(signature, _CAUSAL_CONV_WITH_STATE, CONTRIB, (DOMAIN,))
