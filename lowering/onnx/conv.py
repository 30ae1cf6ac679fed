"""The short causal convolution in operators of opset 18: a sum of four shifted products, fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdn_ops.lowering.onnx.function import function

if TYPE_CHECKING:
    from onnx import FunctionProto

_CONV = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  four = Constant <value_ints = [4]> ()
  T = Shape <start = 1, end = 2> (x)
  W = Shape <start = 1, end = 2> (weight)
  short = Sub (four, W)
  front_state = Concat <axis = 0> (zero, zero, short, zero, zero, zero)
  before_d = Pad (initial_state, front_state)
  before = Transpose <perm = [0, 2, 1]> (before_d)
  window = Concat <axis = 1> (before, x)
  front_weight = Concat <axis = 0> (zero, short, zero, zero)
  taps_d = Pad (weight, front_weight)
  taps = Transpose <perm = [1, 0]> (taps_d)
  tap0, tap1, tap2, tap3 = Split <axis = 0, num_outputs = 4> (taps)
  T1 = Add (T, one)
  T2 = Add (T, two)
  x0 = Slice (window, zero, T, one)
  x1 = Slice (window, one, T1, one)
  x2 = Slice (window, two, T2, one)
  y0 = Mul (x0, tap0)
  y1 = Mul (x1, tap1)
  y2 = Mul (x2, tap2)
  y3 = Mul (x, tap3)
  y01 = Add (y0, y1)
  y23 = Add (y2, y3)
  y_plain = Add (y01, y23)
  y_bias = Add (y_plain, bias)
  silu_i = Constant <value_int: int = @silu> ()
  silu = Cast <to = 9> (silu_i)
  y = If (silu) <
    then_branch = activated () => (float[B, T, D] y_silu) { s = Sigmoid (y_bias) y_silu = Mul (y_bias, s) },
    else_branch = plain () => (float[B, T, D] y_none) { y_none = Identity (y_bias) }
  >
  tail = Add (T, short)
  tail_end = Add (T, three)
  newest = Slice (window, tail, tail_end, one)
  final_state = Transpose <perm = [0, 2, 1]> (newest)
"""


def conv() -> FunctionProto:
    """``gdn_ops::CausalConv1d <silu> (x, weight, bias, initial_state) => (y, final_state)``, all fp32.

    A weight narrower than four gets zeros in front, and so does its window.
    """
    return function("CausalConv1d <silu> (x, weight, bias, initial_state) => (y, final_state)", _CONV)
