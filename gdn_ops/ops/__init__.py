"""Floor 2: the operators of namespace ``gdn``, registered on import."""

from __future__ import annotations

import torch

from gdn_ops.kernels.batch_invariance import batch_invariant
from gdn_ops.ops.causal_conv1d import causal_conv1d, causal_conv1d_backward, causal_conv1d_update_
from gdn_ops.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_backward,
    recurrent_gated_delta_rule,
    recurrent_gated_delta_rule_,
)
from gdn_ops.ops.gated_linear_attention import (
    chunk_gated_linear_attention,
    chunk_gated_linear_attention_backward,
    recurrent_gated_linear_attention,
)

__all__ = [
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update_",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_backward",
    "chunk_gated_linear_attention",
    "chunk_gated_linear_attention_backward",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_",
    "recurrent_gated_linear_attention",
    "save_list",
]


def save_list() -> list[torch._ops.OpOverload]:
    """The operators whose results are worth keeping under selective activation checkpointing.

    Example::

        >>> from functools import partial
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> context = partial(create_selective_checkpoint_contexts, save_list())
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=context)  # doctest: +SKIP
    """
    return [chunk_gated_delta_rule, chunk_gated_linear_attention]
