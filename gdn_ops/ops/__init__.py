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


def save_list(products: bool = False) -> list[torch._ops.OpOverload]:
    """The operators whose results are worth keeping under selective activation checkpointing.

    Args:
        products: torch's matrix products and attention, too, so that only what is elementwise, norms and convolutions
            are computed again.

    Example::

        >>> from functools import partial
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> context = partial(create_selective_checkpoint_contexts, save_list())
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=context)  # doctest: +SKIP
    """
    rules, aten = [chunk_gated_delta_rule, chunk_gated_linear_attention], torch.ops.aten
    if not products:
        return rules
    from torch.nn.attention import varlen  # noqa: F401, registers its operator; too heavy for ``import gdn_ops``

    return [
        *rules, aten.mm.default, aten.addmm.default, aten.bmm.default, torch.ops.torch_attn._varlen_attn.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    ]  # fmt: skip
