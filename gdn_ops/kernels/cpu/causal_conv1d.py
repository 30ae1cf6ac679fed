"""Short depthwise causal convolution on CPU: a sum of ``W`` shifted products, and its gradients.

Layout ``x [B, T, D]``, ``weight [D, W]``, state ``[N, D, W - 1]`` (oldest input first).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.kernels.cpu.chunks import compute_dtype, one, sequences
from gdn_ops.kernels.cpu.gated_delta_rule import pool_slots, taken


def _window(x: Tensor, W: int, initial_state: Tensor | None) -> Tensor:
    before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if initial_state is None else initial_state.transpose(1, 2)
    return torch.cat([before, x], dim=1).to(compute_dtype(x))


def _copy(view: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and in memory of its own: a result that shares a larger buffer would keep all of it alive."""
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _pre_activation(window: Tensor, T: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(window.dtype)
    y = window[:, :T] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y.addcmul_(window[:, i : i + T], weight[:, i])
    return y if bias is None else y.add_(bias.to(window.dtype))


def _forward_dense(x, weight, bias, initial_state, silu) -> tuple[Tensor, Tensor]:
    T, W = x.shape[1], weight.shape[1]
    window = _window(x, W, initial_state)
    y = _pre_activation(window, T, weight, bias)
    if silu:
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype), _copy(window[:, T:].transpose(1, 2), x.dtype)


def forward(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        y, state = _forward_dense(x, weight, bias, initial_state, silu)
    else:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        state = x.new_empty(cu_seqlens.numel() - 1, x.shape[2], weight.shape[1] - 1)
        for n, tokens in sequences(cu_seqlens, x.shape[1]):
            y[:, tokens], state[n : n + 1] = _forward_dense(x[:, tokens], weight, bias, one(initial_state, n), silu)
    if not output_final_state:
        state = state.new_empty(0, *state.shape[1:])
    return y.contiguous(), state.contiguous()


def _backward_dense(dy, dfinal_state, x, weight, bias, initial_state, silu) -> tuple[Tensor, ...]:
    T, W = x.shape[1], weight.shape[1]
    window = _window(x, W, initial_state)
    dy = dy.to(window.dtype)
    if silu:
        y = _pre_activation(window, T, weight, bias)
        s = y.sigmoid()
        dy = dy * s * (1 + y * (1 - s))
    dwindow = torch.zeros_like(window)
    for i in range(W):
        dwindow[:, i : i + T].addcmul_(dy, weight[:, i].to(dy.dtype))
    if dfinal_state is not None:
        dwindow[:, T:] += dfinal_state.transpose(1, 2)
    dweight = torch.stack([(dy * window[:, i : i + T]).sum((0, 1)) for i in range(W)], dim=1)
    return dwindow[:, W - 1 :], dweight, dy.sum((0, 1)), dwindow[:, : W - 1].transpose(1, 2)


def backward(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu) -> tuple[Tensor, ...]:
    if cu_seqlens is None:
        dx, dweight, dbias, dstate = _backward_dense(dy, dfinal_state, x, weight, bias, initial_state, silu)
    else:
        dtype = compute_dtype(x)
        dx = torch.empty(x.shape, dtype=dtype, device=x.device)
        dstates = [x.new_empty(0, x.shape[2], weight.shape[1] - 1, dtype=dtype)]
        dweight = weight.new_zeros(weight.shape, dtype=dtype)
        dbias = weight.new_zeros(len(weight), dtype=dtype)
        for n, tokens in sequences(cu_seqlens, x.shape[1]):
            dx[:, tokens], dw, db, ds = _backward_dense(
                dy[:, tokens], one(dfinal_state, n), x[:, tokens], weight, bias, one(initial_state, n), silu
            )
            dweight, dbias = dweight + dw, dbias + db
            dstates.append(ds)
        dstate = torch.cat(dstates)
    dbias = dbias.to(bias.dtype) if bias is not None else dbias.new_empty(0, dtype=weight.dtype)
    dstate = dstate if initial_state is not None else dstate[:0]
    return _copy(dx, x.dtype), dweight.to(weight.dtype), dbias, _copy(dstate, x.dtype)


def update_(x, weight, bias, state, state_indices, silu) -> Tensor:
    slots = pool_slots(state, state_indices, x.shape[0])
    real = slots >= 0
    y, final = forward(x, weight, bias, taken(state, slots).to(x.dtype), None, silu, True)
    state[slots[real]] = final[real].to(state.dtype)
    y[~real] = 0
    return y
