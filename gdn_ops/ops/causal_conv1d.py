"""The operators of the short causal convolution: ``gdn::causal_conv1d``, its backward, ``gdn::causal_conv1d_update_``.

Layout ``x [B, T, D]``, ``weight [D, W]``, state ``[N, D, W - 1]`` in x's dtype, oldest input first.
"""

from __future__ import annotations

import torch

from gdn_ops.kernels.cpu import causal_conv1d as cpu
from gdn_ops.ops.gated_delta_rule import sequence_count
from gdn_ops.ops.registration import fresh, register


def _fake_forward(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state):
    N = sequence_count(x, cu_seqlens) if output_final_state else 0
    return fresh(x, *x.shape), fresh(x, N, x.shape[2], weight.shape[1] - 1)


def _fake_backward(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    N = 0 if initial_state is None else sequence_count(x, cu_seqlens)
    dbias = fresh(weight, 0) if bias is None else fresh(bias, *bias.shape)
    return fresh(x, *x.shape), fresh(weight, *weight.shape), dbias, fresh(x, N, x.shape[2], weight.shape[1] - 1)


def _flops(x, weight, *args, out_val=None, **kwargs) -> int:
    B, T, D = x
    return 2 * B * T * D * weight[1]


def _backward_flops(dy, dfinal_state, x, weight, *args, out_val=None, **kwargs) -> int:
    return 3 * _flops(x, weight)


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_state, cu_seqlens, silu, output_final_state = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.silu, ctx.output_final_state = silu, output_final_state


def _backward(ctx, dy, dfinal_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = torch.ops.gdn.causal_conv1d_backward(
        dy, dfinal_state if ctx.output_final_state else None, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    return (
        dx, dweight, None if bias is None else dbias, None if initial_state is None else dstate, None, None, None,
    )  # fmt: skip


causal_conv1d = register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu, "
    "bool output_final_state) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    triton="causal_conv1d:forward",
    fake=_fake_forward,
    backward=(_backward, _setup_context),
    autocast=(0, 1, 2, 3),
    flops=_flops,
)
causal_conv1d_backward = register(
    "causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    triton="causal_conv1d:backward",
    fake=_fake_backward,
    flops=_backward_flops,
)
causal_conv1d_update_ = register(
    "causal_conv1d_update_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor? state_indices, "
    "bool silu) -> Tensor",
    cpu=cpu.update_,
    triton="causal_conv1d:update_",
    fake=lambda x, weight, bias, state, state_indices, silu: fresh(x, *x.shape),
    autocast=(0, 1, 2),
    flops=_flops,
)
