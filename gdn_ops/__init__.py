"""gdn_ops: the gated delta rule (Gated DeltaNet, arXiv 2412.06464) as a first-class PyTorch operator."""

from gdn_ops import ops, reference
from gdn_ops.functional import (
    causal_conv1d,
    causal_conv1d_update_,
    chunk_gated_delta_rule,
    chunk_gated_linear_attention,
    fused_recurrent_gated_delta_rule,
    recurrent_gated_delta_rule,
    recurrent_gated_delta_rule_,
    recurrent_gated_linear_attention,
)

__version__ = "0.1.0"

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update_",
    "chunk_gated_delta_rule",
    "chunk_gated_linear_attention",
    "fused_recurrent_gated_delta_rule",
    "ops",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_",
    "recurrent_gated_linear_attention",
    "reference",
]
