"""What each operator becomes in an ONNX file.

``translation`` brings the operators through torch's exporter, each as one node ``gdn_ops::GatedDeltaRule``,
``gdn_ops::GatedLinearAttention`` or ``gdn_ops::CausalConv1d``; ``rule``, ``conv`` and ``contrib`` say in plain ONNX
what nodes compute; ``targets`` turns them into what a target wants; ``stamps`` raises and checks the opsets.

| target | rule | convolution | opset |
|---|---|---|---|
| ``portable`` | ``gdn_ops::GatedDeltaRule`` | ``gdn_ops::CausalConv1d`` | 18 |
| ``ort``, fp32 | ``com.microsoft::LinearAttention`` | ``com.microsoft::CausalConvWithState`` | 18 |
| ``ort``, fp16 | ``com.microsoft::GatedDeltaNet`` | ``com.microsoft::CausalConvWithState`` | 18 |
| ``onnx27`` | ``ai.onnx::LinearAttention`` | ``ai.onnx::CausalConvWithState`` | 27 |

Gated linear attention is ``gdn_ops::GatedLinearAttention`` in the first three rows and ``ai.onnx::LinearAttention``
(``update_rule="gated"``) in the last.

The nodes of the first three rows are functions with their bodies in the file; ONNX Runtime has kernels for those of
``com.microsoft`` and runs them instead.
"""

from gdn_ops.lowering.onnx.targets import TARGETS, lower
from gdn_ops.lowering.onnx.translation import translating

__all__ = ["TARGETS", "lower", "translating"]
