"""The operators of gated linear attention, the rule without erasing (Mamba2's: B as k, C as q, dt * x as v).

``gdn::chunk_gated_linear_attention`` (training and prefill), its backward, and
``gdn::recurrent_gated_linear_attention`` (short sequences and decode). Contracts as in ``gated_delta_rule.py``, without
``beta``.
"""

from __future__ import annotations

import torch

from gdn_ops.kernels.cpu import gated_linear_attention as cpu
from gdn_ops.kernels.cpu.chunks import CHUNK, compute_dtype
from gdn_ops.ops.gated_delta_rule import sequence_count
from gdn_ops.ops.registration import fresh, register

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g"


def _fake_forward(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state):
    N = sequence_count(q, cu_seqlens) if output_final_state else 0
    return fresh(v, *v.shape), fresh(q, N, v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))


def _fake_backward(do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, scale):
    N = 0 if initial_state is None else sequence_count(q, cu_seqlens)
    dS = fresh(q, N, v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))
    return (*(fresh(x, *x.shape) for x in (q, k, v, g)), dS)


def _forward_flops(q, k, v, *args, out_val=None, **kwargs) -> int:
    """Products of one chunkwise pass over ``q, k, v`` shapes at chunk C (multiply and add count two)."""
    (B, T, HV, V), K = v, k[-1]
    return 2 * B * T * HV * (CHUNK * K + CHUNK * V + 2 * K * V)


def _recurrent_flops(q, k, v, *args, out_val=None, **kwargs) -> int:
    """Products of every token: the write and the read."""
    (B, T, HV, V), K = v, k[-1]
    return 2 * B * T * HV * 2 * K * V


def _backward_flops(do, dfinal_state, q, k, v, *args, out_val=None, **kwargs) -> int:
    """The forward again, and two products for each of its own."""
    return 3 * _forward_flops(q, k, v)


def _setup_context(ctx, inputs, output):
    q, k, v, g, initial_state, cu_seqlens, scale, output_final_state = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
    ctx.scale, ctx.output_final_state = scale, output_final_state


def _backward(ctx, do, dfinal_state):
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal_state = dfinal_state if ctx.output_final_state else None
    *grads, dS = torch.ops.gdn.chunk_gated_linear_attention_backward(
        do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, ctx.scale
    )
    return (*grads, None if initial_state is None else dS, None, None, None)


_FORWARD = (
    f"({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, float scale, bool output_final_state) -> (Tensor, Tensor)"
)

chunk_gated_linear_attention = register(
    "chunk_gated_linear_attention" + _FORWARD,
    cpu=cpu.chunk_forward,
    triton="linear_attention:chunk_forward",
    fake=_fake_forward,
    backward=(_backward, _setup_context),
    autocast=(0, 1, 2),
    flops=_forward_flops,
)
chunk_gated_linear_attention_backward = register(
    f"chunk_gated_linear_attention_backward(Tensor do, Tensor? dfinal_state, {_INPUTS}, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.chunk_backward,
    triton="linear_attention_backward:chunk_backward",
    fake=_fake_backward,
    flops=_backward_flops,
)
recurrent_gated_linear_attention = register(
    "recurrent_gated_linear_attention" + _FORWARD,
    cpu=cpu.recurrent_forward,
    triton="linear_attention:recurrent_forward",
    fake=_fake_forward,
    backward=(_backward, _setup_context),
    autocast=(0, 1, 2),
    flops=_recurrent_flops,
)
