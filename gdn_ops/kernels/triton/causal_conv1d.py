"""Short depthwise causal convolution on the GPU: forward, backward and the in-place step, bound by memory.

Layout ``x [B, T, D]``, ``weight [D, W]`` with ``W`` 2 to 4, states ``[N, D, W - 1]``, oldest input first. Arithmetic
is fp32. With lag ``j = 0 .. W - 1`` and ``w_j = weight[:, W - 1 - j]``::

    z_t = bias + sum_j w_j x_{t-j}          y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
    dz_t = dy_t, or dy_t silu'(z_t)         dx_t = sum_j w_j dz_{t+j}        dw_j = sum_t dz_t x_{t-j}

where ``t - j`` and ``t + j`` stay inside the sequence; before its first token stands the initial state, and the final
state is the window after its last, which hands its gradient to the tokens (or the initial state) that it holds.

**Forward.** A program walks ``BT`` tokens of ``BD`` channels upwards with the last ``W - 1`` inputs in registers: each
is loaded once, six tokens ahead of its use. Terms are added from lag 0 up wherever they come from, so a split sequence
gives the whole one's bits.

**Backward.** The same walk, with the last ``W - 1`` unfinished ``dx`` in registers besides, so that every ``dz`` is
computed once; it goes on for ``W - 1`` tokens past the block, for ``dx`` only. Weight gradients are summed
in registers; each block writes its own row of a partial-sum buffer and torch adds the rows: no atomics, so the same
inputs give the same bits.

**Step.** A program moves the window of one (slot, tile of channels) over the tokens and writes it back.

**Packed sequences.** A token's sequence is found by binary search in ``cu_seqlens`` on the device (the last ``n`` with
``cu_seqlens[n] <= t``, which passes over empty sequences). Tokens past ``cu_seqlens[-1]`` give zeros, in ``y`` and
``dx``. Bounds are clamped: wrong ones give wrong numbers, never an access outside the tensors.

Final states and gradients of initial states are made by extra programs of the same launch, one a (sequence, tile of
channels). Offsets are 64-bit; every operand may have any strides and floating dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.launch import launch

# Tokens and channels of a program, and its warps: four channels a thread. Of the forward, 16 tokens or 64 take .210 and
# .222 ms on an H100 (bf16, 8x4096x4608), where a copy takes .201; of the backward 64, since its partial sums are then a
# tenth of the input.
FORWARD_TILE, BACKWARD_TILE = (16, 256, 2), (64, 256, 2)
# Tokens that are loaded ahead, and steps of the loop in one, in which what was loaded and what is unfinished change
# their names, not their registers.
AHEAD, UNROLL = 6, 4
UPDATE_TILE = (256, 4)  # BD, warps


@triton.jit
def _sequence_of(t, N, cu_seqlens):
    """The last ``n`` in ``0 .. N - 1`` with ``cu_seqlens[n] <= t`` (0 if there is none), for one token or a block."""
    n = t * 0
    size = tl.full([], N, tl.int32)
    while size > 1:
        half = size // 2
        after = tl.load(cu_seqlens + n + half).to(tl.int64) <= t
        n = tl.where(after, n + half, n)
        size -= half
    return n


@triton.jit
def _bounds(n, T, cu_seqlens):
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), begin), T)
    return begin, end


@triton.jit
def _column(weight, i, mask_d, stride_weight_w):
    return tl.load(weight + i * stride_weight_w, mask=mask_d, other=0.0).to(tl.float32)


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _silu_gradient(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _input(x, state, t, begin, mask_d, stride_x_t, stride_state_w, W: tl.constexpr):
    """Input ``t`` of a sequence that begins at ``begin``, in fp32; before that stands its initial state."""
    value_d = tl.load(x + t * stride_x_t, mask=mask_d & (t >= begin), other=0.0).to(tl.float32)
    if state is not None:
        index = t - begin + (W - 1)
        before = mask_d & (t < begin) & (index >= 0)
        value_d += tl.load(state + index * stride_state_w, mask=before, other=0.0).to(tl.float32)
    return value_d


@triton.jit
def _coming(x, t, stop, mask_d, stride_x_t):
    """Token ``t`` as it was stored."""
    return tl.load(x + t * stride_x_t, mask=mask_d & (t < stop), other=0.0)


@triton.jit
def _taps(weight, mask_d, stride_weight_w, W: tl.constexpr):
    """The weights of lags 0 to 3, zeros from ``W`` on."""
    w0_d = _column(weight, W - 1, mask_d, stride_weight_w)
    w1_d = _column(weight, W - 2, mask_d, stride_weight_w)
    w2_d = tl.zeros_like(w0_d)
    w3_d = tl.zeros_like(w0_d)
    if W > 2:
        w2_d = _column(weight, W - 3, mask_d, stride_weight_w)
    if W > 3:
        w3_d = _column(weight, W - 4, mask_d, stride_weight_w)
    return w0_d, w1_d, w2_d, w3_d


@triton.jit
def _sequence_at(b, t, T, N, cu_seqlens):
    """Of token ``t`` of row ``b`` the sequence, its first token and its end."""
    if cu_seqlens is None:
        n = b
        begin = t * 0
        end = begin + T
    else:
        n = _sequence_of(t, N, cu_seqlens)
        begin, end = _bounds(n, T, cu_seqlens)
    return n, begin, end


@triton.jit
def _sequence_on(n, begin, end, t, T, N, cu_seqlens):
    """The same of token ``t``, which is in sequence ``n`` or one that comes after it."""
    while (t >= end) & (n + 1 < N):
        n += 1
        begin, end = _bounds(n, T, cu_seqlens)
    return n, begin, end


@triton.jit
def _window(x, state, n, t, begin, mask_d, stride_x_t, stride_state_n, stride_state_w, W: tl.constexpr):
    """The three inputs of sequence ``n`` before token ``t``, as far as ``W`` reaches."""
    if state is not None:
        state += n * stride_state_n
    x1_d = _input(x, state, t - 1, begin, mask_d, stride_x_t, stride_state_w, W)
    x2_d = tl.zeros_like(x1_d)
    x3_d = tl.zeros_like(x1_d)
    if W > 2:
        x2_d = _input(x, state, t - 2, begin, mask_d, stride_x_t, stride_state_w, W)
    if W > 3:
        x3_d = _input(x, state, t - 3, begin, mask_d, stride_x_t, stride_state_w, W)
    return x1_d, x2_d, x3_d


@triton.jit
def causal_conv1d_forward_kernel(
    x,
    weight,
    bias,
    initial_state,
    y,
    final_state,
    cu_seqlens,
    T,
    N,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_weight_d,
    stride_weight_w,
    stride_bias,
    stride_initial_n,
    stride_initial_d,
    stride_initial_w,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``cu_seqlens`` None: one sequence a row; ``final_state`` None: no programs for it. ``x1_d .. x3_d`` are the
    inputs before token ``t``."""
    ND: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    d = (program % ND * BD + tl.arange(0, BD)).to(tl.int64)
    mask_d = d < D
    row = program // ND
    NT = tl.cdiv(T, BT)
    tiles = NT
    if cu_seqlens is None:
        tiles = N * NT
    weight += d * stride_weight_d
    x += d * stride_x_d
    state = initial_state
    if initial_state is not None:
        state = initial_state + d * stride_initial_d

    if row >= tiles:
        if final_state is not None:
            n = (row - tiles).to(tl.int64)
            if cu_seqlens is None:
                begin = n * 0
                end = begin + T
                x += n * stride_x_b
            else:
                begin, end = _bounds(n, T, cu_seqlens)
            if initial_state is not None:
                state += n * stride_initial_n
            for i in tl.static_range(W - 1):
                last_d = _input(x, state, end - (W - 1) + i, begin, mask_d, stride_x_t, stride_initial_w, W)
                out = final_state + (n * D + d) * (W - 1) + i
                tl.store(out, last_d.to(final_state.dtype.element_ty), mask=mask_d)
        return

    b = (row // NT).to(tl.int64)
    first = (row % NT).to(tl.int64) * BT
    stop = tl.minimum(first + BT, T)
    x += b * stride_x_b
    y += b * T * D + d
    n, begin, end = _sequence_at(b, first, T, N, cu_seqlens)
    bias_d = tl.zeros([BD], dtype=tl.float32)
    if bias is not None:
        bias_d = tl.load(bias + d * stride_bias, mask=mask_d, other=0.0).to(tl.float32)
    w0_d, w1_d, w2_d, w3_d = _taps(weight, mask_d, stride_weight_w, W)
    known = mask_d & (first >= begin)
    x1_d, x2_d, x3_d = _window(
        x, state, n, first, begin, known, stride_x_t, stride_initial_n, stride_initial_w, W
    )  # fmt: skip
    coming = ()
    for i in tl.static_range(AHEAD):
        coming = coming + (_coming(x, first + i, stop, mask_d, stride_x_t),)
    for step in tl.range(0, BT, loop_unroll_factor=UNROLL):
        t = first + step
        x0_d = coming[0].to(tl.float32)
        coming = coming[1:] + (_coming(x, t + AHEAD, stop, mask_d, stride_x_t),)
        if cu_seqlens is not None:
            n, begin, end = _sequence_on(n, begin, end, t, T, N, cu_seqlens)
            if t == begin:
                x1_d, x2_d, x3_d = _window(
                    x, state, n, t, begin, mask_d, stride_x_t, stride_initial_n, stride_initial_w, W
                )
        z_d = bias_d + x0_d * w0_d + x1_d * w1_d
        if W > 2:
            z_d += x2_d * w2_d
        if W > 3:
            z_d += x3_d * w3_d
        if SILU:
            z_d = _silu(z_d)
        if cu_seqlens is not None:
            z_d = tl.where((t >= begin) & (t < end), z_d, 0.0)
        tl.store(y + t * D, z_d.to(y.dtype.element_ty), mask=mask_d & (t < stop))
        x3_d = x2_d
        x2_d = x1_d
        x1_d = x0_d


@triton.jit
def _initial_state_gradient(
    dinitial_state,
    dy,
    dfinal_state,
    x,
    state,
    weight,
    bias_d,
    begin,
    end,
    mask_d,
    stride_dy_t,
    stride_dfinal_w,
    stride_x_t,
    stride_weight_w,
    stride_state_w,
    W: tl.constexpr,
    SILU: tl.constexpr,
):
    """For one sequence; pointers are blocks over its channels. Element ``i`` has lag ``s + W - 1 - i`` at token s."""
    length = end - begin
    for i in tl.static_range(W - 1):
        sum_d = bias_d * 0.0
        if dfinal_state is not None:
            kept = mask_d & (length <= i)
            sum_d += tl.load(dfinal_state + (i - length) * stride_dfinal_w, mask=kept, other=0.0).to(tl.float32)
        for s in tl.static_range(i + 1):
            here = mask_d & (s < length)
            dz_d = tl.load(dy + (begin + s) * stride_dy_t, mask=here, other=0.0).to(tl.float32)
            if SILU:
                z_d = bias_d
                for j in tl.static_range(W):
                    w_d = _column(weight, W - 1 - j, mask_d, stride_weight_w)
                    z_d += w_d * _input(x, state, begin + s - j, begin, here, stride_x_t, stride_state_w, W)
                dz_d = dz_d * _silu_gradient(z_d)
            w_d = _column(weight, i - s, mask_d, stride_weight_w)
            sum_d += tl.where(here, w_d * dz_d, 0.0)
        tl.store(dinitial_state + i, sum_d.to(dinitial_state.dtype.element_ty), mask=mask_d)


@triton.jit
def _pair(x, dy, t, stop, mask_d, stride_x_t, stride_dy_t):
    return _coming(x, t, stop, mask_d, stride_x_t), _coming(dy, t, stop, mask_d, stride_dy_t)


@triton.jit
def _of_sequence(value_d, t, begin, cu_seqlens):
    """Zeros for a token before its sequence; before a whole row's first nothing is stored, so there it may stay."""
    if cu_seqlens is None:
        return value_d
    return tl.where(t >= begin, value_d, 0.0)


@triton.jit
def causal_conv1d_backward_kernel(
    dy,
    dfinal_state,
    x,
    weight,
    bias,
    initial_state,
    dx,
    partial,
    dinitial_state,
    cu_seqlens,
    T,
    N,
    stride_dy_b,
    stride_dy_t,
    stride_dy_d,
    stride_dfinal_n,
    stride_dfinal_d,
    stride_dfinal_w,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_weight_d,
    stride_weight_w,
    stride_bias,
    stride_initial_n,
    stride_initial_d,
    stride_initial_w,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``partial [blocks, W + 1, D]`` gets each block's sums for the columns of ``weight`` and, last, for ``bias``.

    ``x1_d .. x3_d`` are the inputs before token ``t``; ``dx0_d .. dx3_d`` the unfinished gradients from ``t`` down.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    row = program // ND
    d = (program % ND * BD + tl.arange(0, BD)).to(tl.int64)
    mask_d = d < D
    NT = tl.cdiv(T, BT)
    tiles = NT
    if cu_seqlens is None:
        tiles = N * NT
    dy += d * stride_dy_d
    x += d * stride_x_d
    weight += d * stride_weight_d
    state = initial_state
    if dfinal_state is not None:
        dfinal_state += d * stride_dfinal_d
    if initial_state is not None:
        state = initial_state + d * stride_initial_d
    bias_d = tl.zeros([BD], dtype=tl.float32)
    if bias is not None:
        bias_d = tl.load(bias + d * stride_bias, mask=mask_d, other=0.0).to(tl.float32)

    if row >= tiles:
        if dinitial_state is not None:
            n = (row - tiles).to(tl.int64)
            if cu_seqlens is None:
                begin = n * 0
                end = begin + T
                dy += n * stride_dy_b
                x += n * stride_x_b
            else:
                begin, end = _bounds(n, T, cu_seqlens)
            if dfinal_state is not None:
                dfinal_state += n * stride_dfinal_n
            _initial_state_gradient(
                dinitial_state + (n * D + d) * (W - 1), dy, dfinal_state, x, state + n * stride_initial_n, weight,
                bias_d, begin, end, mask_d,
                stride_dy_t, stride_dfinal_w, stride_x_t, stride_weight_w, stride_initial_w, W, SILU,
            )  # fmt: skip
        return

    b = (row // NT).to(tl.int64)
    first = (row % NT).to(tl.int64) * BT
    own = tl.minimum(first + BT, T)
    stop = tl.minimum(first + (BT + W - 1), T)
    dy += b * stride_dy_b
    x += b * stride_x_b
    dx += b * T * D + d
    n, begin, end = _sequence_at(b, first, T, N, cu_seqlens)

    w0_d, w1_d, w2_d, w3_d = _taps(weight, mask_d, stride_weight_w, W)
    zeros_d = tl.zeros([BD], dtype=tl.float32)
    dx1_d, dx2_d, dx3_d = zeros_d, zeros_d, zeros_d
    dw0_d, dw1_d, dw2_d, dw3_d, dbias_d = zeros_d, zeros_d, zeros_d, zeros_d, zeros_d
    known = mask_d & (first >= begin)
    x1_d, x2_d, x3_d = _window(
        x, state, n, first, begin, known, stride_x_t, stride_initial_n, stride_initial_w, W
    )  # fmt: skip
    coming = ()
    for i in tl.static_range(AHEAD):
        coming = coming + (_pair(x, dy, first + i, stop, mask_d, stride_x_t, stride_dy_t),)
    for step in tl.range(0, BT + W - 1, loop_unroll_factor=UNROLL):
        t = first + step
        x_d, dy_d = coming[0]
        coming = coming[1:] + (_pair(x, dy, t + AHEAD, stop, mask_d, stride_x_t, stride_dy_t),)
        x0_d = x_d.to(tl.float32)
        dz_d = dy_d.to(tl.float32)
        if cu_seqlens is not None:
            n, begin, end = _sequence_on(n, begin, end, t, T, N, cu_seqlens)
            if t == begin:
                x1_d, x2_d, x3_d = _window(
                    x, state, n, t, begin, mask_d, stride_x_t, stride_initial_n, stride_initial_w, W
                )
            # Tokens after the last sequence may hold anything, NaN too.
            inside = (t >= begin) & (t < end)
            dz_d = tl.where(inside, dz_d, 0.0)
            x0_d = tl.where(inside, x0_d, 0.0)
        if SILU:
            z_d = bias_d + x0_d * w0_d + x1_d * w1_d
            if W > 2:
                z_d += x2_d * w2_d
            if W > 3:
                z_d += x3_d * w3_d
            dz_d = dz_d * _silu_gradient(z_d)

        mine_d = tl.where(t < own, dz_d, 0.0)
        if bias is not None:
            dbias_d += mine_d
        dw0_d += mine_d * x0_d
        dw1_d += mine_d * x1_d
        dx0_d = dz_d * w0_d
        if dfinal_state is not None:
            left = end - t
            kept = mask_d & (t >= begin) & (left >= 1) & (left <= W - 1)
            source = dfinal_state + n * stride_dfinal_n + (W - 1 - left) * stride_dfinal_w
            dx0_d += tl.load(source, mask=kept, other=0.0).to(tl.float32)
        dx1_d += _of_sequence(dz_d * w1_d, t - 1, begin, cu_seqlens)
        done_d = dx1_d
        if W > 2:
            dw2_d += mine_d * x2_d
            dx2_d += _of_sequence(dz_d * w2_d, t - 2, begin, cu_seqlens)
            done_d = dx2_d
        if W > 3:
            dw3_d += mine_d * x3_d
            dx3_d += _of_sequence(dz_d * w3_d, t - 3, begin, cu_seqlens)
            done_d = dx3_d
        ready = t - (W - 1)
        tl.store(dx + ready * D, done_d.to(dx.dtype.element_ty), mask=mask_d & (ready >= first) & (ready < own))
        x3_d = x2_d
        x2_d = x1_d
        x1_d = x0_d
        dx3_d = dx2_d
        dx2_d = dx1_d
        dx1_d = dx0_d

    partial += row.to(tl.int64) * ((W + 1) * D) + d
    tl.store(partial + (W - 1) * D, dw0_d, mask=mask_d)
    tl.store(partial + (W - 2) * D, dw1_d, mask=mask_d)
    if W > 2:
        tl.store(partial + (W - 3) * D, dw2_d, mask=mask_d)
    if W > 3:
        tl.store(partial + (W - 4) * D, dw3_d, mask=mask_d)
    tl.store(partial + W * D, dbias_d, mask=mask_d)


@triton.jit
def causal_conv1d_update_kernel(
    x,
    weight,
    bias,
    state,
    state_indices,
    y,
    T,
    P,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_weight_d,
    stride_weight_w,
    stride_bias,
    stride_state_p,
    stride_state_d,
    stride_state_w,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BD: tl.constexpr,
):
    """Row ``b`` on slot ``state_indices[b]`` of a pool of ``P`` windows; outside the pool the outputs are zeros."""
    ND: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    b = (program // ND).to(tl.int64)
    d = (program % ND * BD + tl.arange(0, BD)).to(tl.int64)
    slot = b
    if state_indices is not None:
        slot = tl.load(state_indices + b).to(tl.int64)
    real = (slot >= 0) & (slot < P)
    mask_d = d < D
    used_d = mask_d & real
    x += b * stride_x_b + d * stride_x_d
    y += b * T * D + d
    weight += d * stride_weight_d
    state += slot * stride_state_p + d * stride_state_d
    low = x.dtype.element_ty

    bias_d = tl.zeros([BD], dtype=tl.float32)
    if bias is not None:
        bias_d = tl.load(bias + d * stride_bias, mask=mask_d, other=0.0).to(tl.float32)
    w0_d = _column(weight, W - 1, mask_d, stride_weight_w)
    w1_d = _column(weight, W - 2, mask_d, stride_weight_w)
    x1_d = tl.load(state + (W - 2) * stride_state_w, mask=used_d, other=0.0).to(low)
    w2_d = w1_d
    w3_d = w1_d
    x2_d = x1_d
    x3_d = x1_d
    if W > 2:
        w2_d = _column(weight, W - 3, mask_d, stride_weight_w)
        x2_d = tl.load(state + (W - 3) * stride_state_w, mask=used_d, other=0.0).to(low)
    if W > 3:
        w3_d = _column(weight, W - 4, mask_d, stride_weight_w)
        x3_d = tl.load(state + (W - 4) * stride_state_w, mask=used_d, other=0.0).to(low)
    for _ in range(0, T):
        x0_d = tl.load(x, mask=used_d, other=0.0)
        z_d = bias_d + x0_d.to(tl.float32) * w0_d + x1_d.to(tl.float32) * w1_d
        if W > 2:
            z_d += x2_d.to(tl.float32) * w2_d
        if W > 3:
            z_d += x3_d.to(tl.float32) * w3_d
        if SILU:
            z_d = _silu(z_d)
        tl.store(y, tl.where(real, z_d, 0.0).to(y.dtype.element_ty), mask=mask_d)
        x3_d = x2_d
        x2_d = x1_d
        x1_d = x0_d
        x += stride_x_t
        y += D
    kept = state.dtype.element_ty
    tl.store(state + (W - 2) * stride_state_w, x1_d.to(kept), mask=used_d)
    if W > 2:
        tl.store(state + (W - 3) * stride_state_w, x2_d.to(kept), mask=used_d)
    if W > 3:
        tl.store(state + (W - 4) * stride_state_w, x3_d.to(kept), mask=used_d)


def _blocks(tokens, block: int):
    """``ceil(tokens / block)``, also of a symbolic number of tokens."""
    return (tokens + block - 1) // block


def _channel_tile(D: int, widest: int) -> int:
    return max(32, min(widest, triton.next_power_of_2(D)))


def conv_forward_configuration(D: int) -> dict[str, int]:
    BT, widest, num_warps = FORWARD_TILE
    return {"BT": BT, "BD": _channel_tile(D, widest), "num_warps": num_warps}


def _strides(x: Tensor | None, *names: str) -> dict[str, int]:
    return {name: 0 if x is None else x.stride(i) for i, name in enumerate(names)}


def _hand_on(source: Tensor | None, state: Tensor) -> Tensor:
    """Without tokens a state (or its gradient) passes unchanged; None is zeros."""
    return state.zero_() if source is None else state.copy_(source)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    silu: bool, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y [B, T, D]`` and the final state ``[N, D, W - 1]`` (no rows unless asked for), in x's dtype, in one launch."""
    (B, T, D), W = x.shape, weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    final_state = torch.empty((N if output_final_state else 0, D, W - 1), dtype=x.dtype, device=x.device)
    if N == 0 or D == 0:
        return y.zero_(), final_state
    if isinstance(T, int) and T == 0:
        return y, _hand_on(initial_state, final_state) if output_final_state else final_state
    configuration = conv_forward_configuration(D)
    rows = B * _blocks(T, configuration["BT"]) + (N if output_final_state else 0)
    launch(causal_conv1d_forward_kernel)[(rows * _blocks(D, configuration["BD"]),)](
        x=x, weight=weight, bias=bias, initial_state=initial_state, y=y,
        final_state=final_state if output_final_state else None,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), T=T, N=N,
        **_strides(x, "stride_x_b", "stride_x_t", "stride_x_d"),
        **_strides(weight, "stride_weight_d", "stride_weight_w"),
        **_strides(bias, "stride_bias"),
        **_strides(initial_state, "stride_initial_n", "stride_initial_d", "stride_initial_w"),
        D=D, W=W, SILU=silu, AHEAD=AHEAD, UNROLL=UNROLL, **configuration,
    )  # fmt: skip
    return y, final_state


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias (``[0]`` in weight's dtype without one) and initial_state (no rows without one)."""
    (B, T, D), W = x.shape, weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    BT, BD, num_warps = BACKWARD_TILE[0], _channel_tile(D, BACKWARD_TILE[1]), BACKWARD_TILE[2]
    blocks = B * _blocks(T, BT)
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    dinitial_state = torch.empty((0 if initial_state is None else N, D, W - 1), dtype=x.dtype, device=x.device)
    partial = torch.empty((blocks, W + 1, D), dtype=torch.float32, device=x.device)
    if N == 0 or D == 0:
        dx.zero_(), partial.zero_()
    elif isinstance(T, int) and T == 0:
        if initial_state is not None:
            _hand_on(dfinal_state, dinitial_state)
    else:
        rows = blocks + (0 if initial_state is None else N)
        launch(causal_conv1d_backward_kernel)[(rows * _blocks(D, BD),)](
            dy=dy, dfinal_state=dfinal_state, x=x, weight=weight, bias=bias, initial_state=initial_state, dx=dx,
            partial=partial, dinitial_state=None if initial_state is None else dinitial_state,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), T=T, N=N,
            **_strides(dy, "stride_dy_b", "stride_dy_t", "stride_dy_d"),
            **_strides(dfinal_state, "stride_dfinal_n", "stride_dfinal_d", "stride_dfinal_w"),
            **_strides(x, "stride_x_b", "stride_x_t", "stride_x_d"),
            **_strides(weight, "stride_weight_d", "stride_weight_w"),
            **_strides(bias, "stride_bias"),
            **_strides(initial_state, "stride_initial_n", "stride_initial_d", "stride_initial_w"),
            D=D, W=W, SILU=silu, BT=BT, BD=BD, AHEAD=AHEAD, UNROLL=UNROLL, num_warps=num_warps,
        )  # fmt: skip
    sums = partial.sum(0)
    dweight = torch.empty((D, W), dtype=weight.dtype, device=x.device).copy_(sums[:W].t())
    if bias is None:
        dbias = torch.empty((0,), dtype=weight.dtype, device=x.device)
    else:
        dbias = torch.empty((D,), dtype=bias.dtype, device=x.device).copy_(sums[W])
    return dx, dweight, dbias, dinitial_state


def update_(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """``y [B, T, D]``; the windows ``state [P, D, W - 1]`` of slots ``state_indices [B]`` are advanced in place.

    An index that is no slot, such as the padding index -1, touches no window and its outputs are zeros. Two rows on one
    slot: the result is undefined.
    """
    (B, T, D), W = x.shape, weight.shape[1]
    BD, num_warps = _channel_tile(D, UPDATE_TILE[0]), UPDATE_TILE[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    if B == 0 or D == 0:
        return y
    launch(causal_conv1d_update_kernel)[(B * _blocks(D, BD),)](
        x=x, weight=weight, bias=bias, state=state,
        state_indices=None if state_indices is None else state_indices.contiguous(), y=y, T=T, P=state.shape[0],
        **_strides(x, "stride_x_b", "stride_x_t", "stride_x_d"),
        **_strides(weight, "stride_weight_d", "stride_weight_w"),
        **_strides(bias, "stride_bias"),
        **_strides(state, "stride_state_p", "stride_state_d", "stride_state_w"),
        D=D, W=W, SILU=silu, BD=BD, num_warps=num_warps,
    )  # fmt: skip
    return y


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, dtype, D, W, packed in (
        ("bf16", torch.bfloat16, 4096, 4, False),
        ("fp32 packed", torch.float32, 1000, 3, True),
    ):

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        N = 3 if packed else 2
        x = empty(1 if packed else N, 1000, D)
        weight, bias, state = empty(D, W), empty(D), empty(N, D, W - 1)
        cu_seqlens = empty(N + 1, dtype=torch.int32) if packed else None
        initial_state = state if packed else None
        cases += cases_of_call(f"conv {name}", forward, x, weight, bias, initial_state, cu_seqlens, True, True)
        gradients = (x, initial_state, x, weight, bias, initial_state, cu_seqlens, True)
        cases += cases_of_call(f"conv {name}", backward, *gradients)
        indices = empty(N, dtype=torch.int32)
        cases += cases_of_call(f"conv {name}", update_, x[:, :1].expand(N, 1, D), weight, bias, state, indices, True)
    return cases
