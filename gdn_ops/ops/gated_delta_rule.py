"""The operators of the gated delta rule.

``gdn::chunk_gated_delta_rule`` (training and prefill), its backward, ``gdn::recurrent_gated_delta_rule`` (short
sequences and decode) and the in-place ``gdn::recurrent_gated_delta_rule_`` on a pool of states. Layouts as in
``gdn_ops.reference``. States are fp32 (fp64 for fp64 inputs). ``final_state`` has no rows unless it is asked for, and
``dinitial_state`` none unless there was an ``initial_state``: the number of results never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.kernels.cpu import gated_delta_rule as cpu
from gdn_ops.kernels.cpu.chunks import CHUNK, compute_dtype
from gdn_ops.ops.registration import fresh, register

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"


def sequence_count(q: Tensor, cu_seqlens: Tensor | None):
    """Rows of the batch, or packed sequences."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state):
    N = sequence_count(q, cu_seqlens) if output_final_state else 0
    return fresh(v, *v.shape), fresh(q, N, v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))


def _fake_backward(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale):
    N = 0 if initial_state is None else sequence_count(q, cu_seqlens)
    dS = fresh(q, N, v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))
    return (*(fresh(x, *x.shape) for x in (q, k, v, g, beta)), dS)


def _fake_update(q, k, v, g, beta, state, state_indices, token_state_indices, cu_seqlens, scale):
    return fresh(v, *v.shape)


def _forward_flops(q, k, v, *args, out_val=None, **kwargs) -> int:
    """Products of one chunkwise pass over ``q, k, v`` shapes at chunk C (multiply and add count two)."""
    (B, T, HV, V), K, C = v, k[-1], CHUNK
    return 2 * B * T * HV * (2 * C * K + C * K + 2 * C * V + C * C // 3 + 3 * K * V)


def _recurrent_flops(q, k, v, *args, out_val=None, **kwargs) -> int:
    """Products of every token: what the state holds under its key, the write, the read."""
    (B, T, HV, V), K = v, k[-1]
    return 2 * B * T * HV * 3 * K * V


def _backward_flops(do, dfinal_state, q, k, v, *args, out_val=None, **kwargs) -> int:
    """The forward again, and two products for each of its own."""
    return 3 * _forward_flops(q, k, v)


def _setup_context(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens)
    ctx.scale, ctx.output_final_state = scale, output_final_state


def _backward(ctx, do, dfinal_state):
    q, k, v, g, beta, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal_state = dfinal_state if ctx.output_final_state else None
    *grads, dS = torch.ops.gdn.chunk_gated_delta_rule_backward(
        do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, ctx.scale
    )
    return (*grads, None if initial_state is None else dS, None, None, None)


_FORWARD = (
    f"({_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, float scale, bool output_final_state) -> (Tensor, Tensor)"
)

chunk_gated_delta_rule = register(
    "chunk_gated_delta_rule" + _FORWARD,
    cpu=cpu.chunk_forward,
    triton="chunk_forward:chunk_forward",
    whole="chunk_forward:stays_whole",
    fake=_fake_forward,
    backward=(_backward, _setup_context),
    autocast=(0, 1, 2),
    flops=_forward_flops,
)
chunk_gated_delta_rule_backward = register(
    f"chunk_gated_delta_rule_backward(Tensor do, Tensor? dfinal_state, {_INPUTS}, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.chunk_backward,
    triton="chunk_backward:chunk_backward",
    whole="chunk_backward:stays_whole",
    fake=_fake_backward,
    flops=_backward_flops,
)
recurrent_gated_delta_rule = register(
    "recurrent_gated_delta_rule" + _FORWARD,
    cpu=cpu.recurrent_forward,
    triton="recurrent:recurrent_forward",
    fake=_fake_forward,
    backward=(_backward, _setup_context),
    autocast=(0, 1, 2),
    flops=_recurrent_flops,
)
recurrent_gated_delta_rule_ = register(
    f"recurrent_gated_delta_rule_({_INPUTS}, Tensor(a!) state, Tensor? state_indices, Tensor? token_state_indices, "
    "Tensor? cu_seqlens, float scale) -> Tensor",
    cpu=cpu.recurrent_update_,
    triton="recurrent:recurrent_update_",
    fake=_fake_update,
    autocast=(0, 1, 2),
    flops=_recurrent_flops,
)
