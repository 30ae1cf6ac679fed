"""The chunkwise gated delta rule on the GPU, backward. Nothing is saved by the forward but its inputs.

1. ``intra_chunk`` again, with ``E = P^T dO`` in place of ``P``; then the forward scan, this time writing the state
   ``S`` before each chunk and ``V'``.
2. **reverse_scan_kernel**, one program a (segment, value head, tile of value columns), last chunk first, carries
   ``dS``, the gradient of the state after the chunk, and writes it and ``dU``, the gradient of ``U`` and of ``V'``::

       dU = E + exp(c_C - c) * (K dS)          dS <- exp(c_C) dS + (scale * exp(c) * Q)^T dO - W^T dU

   Two of the three products are a chain; everything else stands outside the loop over chunks.
3. **gradient_kernel**, one program a (chunk, value head, tile of ``BK`` key columns). With ``X = inverse^T dU`` the
   rest is short::

       dV = beta * X                       Y = -X S^T
       dP = lower(dO V'^T)                 dA = -strict_lower(X V'^T)
       dbeta_i = X_i . V_i + exp(c_i) Y_i . K_i + sum_j (dA * D * K K^T)_ij
       dQ = scale * ((dP * D) K + exp(c) * (dO S^T))
       dK = scale * (dP * D)^T Q + (M + M^T) K + beta exp(c) * Y + exp(c_C - c) * (V' dS^T)      (M = beta * dA * D)

   ``dA = -inverse^T (dT) inverse^T`` needs no product with the inverse besides ``X``: U - W S is V', so
   ``X U^T + Y W^T = X (U - W S)^T = X V'^T``. The gate's gradient is the reverse cumulative sum of what each ``exp``
   received. Each operand is loaded once.
4. **group_kernel** adds dQ and dK of the value heads that share a key. (In the kernel before, a loop over the group
   costs more in spilled registers than the extra pass.)

Keys wider than ``BK`` take several programs a chunk, which leave their parts of dg and dbeta to a sum in torch: no
atomics. Source of the chunk form: arXiv 2412.06464, section 3.3; the tests check the derivation against autograd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_forward import (
    AHEAD_OF_TIME,
    ahead_of_time_inputs,
    aligned,
    aligned_state,
    is_narrow,
    scan,
    scan_configuration,
)
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, intra_chunk, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.segments import Maps, combine, maps, segment_length


@triton.jit
def reverse_scan_kernel(
    q,
    k,
    W,
    E,
    from_start,
    to_end,
    do,
    enter,
    leave,
    dstates,
    dU,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_do_b,
    stride_do_t,
    stride_do_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``enter`` is ``dS`` after each segment (None: zeros). With ``dstates`` None nothing is written but ``leave``,
    ``dS`` before each segment; else ``leave`` is that before each sequence, or None."""
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, _, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    if not exists:
        return
    h = hv // (HV // H)
    rows = tl.arange(0, C)
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    state_offsets = in_k[:, None] * V + in_v[None, :]

    length = (end - begin).to(tl.int32)
    chunks = (length + C - 1) // C
    token = begin + (chunks - 1) * C
    q += b * stride_q_b + token * stride_q_t + h * stride_q_h
    k += b * stride_k_b + token * stride_k_t + h * stride_k_h
    do += b * stride_do_b + token * stride_do_t + hv * stride_do_h
    here = (b * HV + hv) * T + token
    W += here * K
    E += here * V
    from_start += here
    to_end += here
    if dstates is not None:
        dU += here * V
        dstates += ((first_chunk + chunks - 1) * HV + hv) * K * V

    if enter is None:
        dS_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        dS_kv = tl.load(enter + (segment * HV + hv) * K * V + state_offsets, mask=mask_kv, other=0.0).to(tl.float32)
    for i in range(0, chunks):
        left = tl.minimum(length - (chunks - 1 - i) * C, C)
        real = rows < left
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
        q_ck = tl.load(q + rows[:, None] * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
        w_ck = tl.load(W + rows[:, None] * K + in_k[None, :], mask=mask_ck, other=0.0)
        do_cv = tl.load(do + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        grown_c = tl.load(from_start + rows, mask=real, other=0.0) * scale
        decay_c = tl.load(to_end + rows, mask=real, other=0.0)
        whole = tl.load(from_start + left - 1)
        dS_low = dS_kv.to(k_ck.dtype)
        kept_cv = tl.dot(k_ck, dS_low, input_precision=PRECISION)
        # Loaded after the product for the reason given in chunk_forward.scan_kernel.
        e_cv = tl.load(E + rows[:, None] * V + in_v[None, :], mask=mask_cv, other=0.0)
        du_wide = e_cv.to(tl.float32) + kept_cv * decay_c[:, None]
        du_cv = du_wide.to(k_ck.dtype)
        grown_cv = (do_cv.to(tl.float32) * grown_c[:, None]).to(q_ck.dtype)
        if dstates is not None:
            tl.store(dstates + state_offsets, dS_low, mask=mask_kv)
            tl.store(dU + rows[:, None] * V + in_v[None, :], du_cv, mask=mask_cv)
            dU -= C * V
            dstates -= HV * K * V
        dS_kv = tl.dot(tl.trans(q_ck), grown_cv, dS_kv * whole, input_precision=PRECISION)
        dS_kv = tl.dot(tl.trans(w_ck), (-du_wide).to(w_ck.dtype), dS_kv, input_precision=PRECISION)
        q -= C * stride_q_t
        k -= C * stride_k_t
        do -= C * stride_do_t
        W -= C * K
        E -= C * V
        from_start -= C
        to_end -= C
    if leave is not None:
        if dstates is None:
            tl.store(leave + (segment * HV + hv) * K * V + state_offsets, dS_kv, mask=mask_kv)
        else:
            if first:
                tl.store(leave + (n * HV + hv) * K * V + state_offsets, dS_kv, mask=mask_kv)


@triton.jit
def gradient_kernel(
    q,
    k,
    v,
    do,
    beta,
    c_sum,
    from_start,
    to_end,
    inverse,
    written,
    dU,
    states,
    dstates,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_do_b,
    stride_do_t,
    stride_do_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_part,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dg, dbeta [NK, B, T, HV]``, ``stride_part`` apart: one part a tile of key columns."""
    NK: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    tile = program % NK
    hv = (program // NK % HV).to(tl.int64)
    chunk = (program // (NK * HV)).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    h = hv // (HV // H)
    low = q.dtype.element_ty
    rows = tl.arange(0, C)
    real = rows < length
    in_k = tile * BK + tl.arange(0, BK)
    mask_k = in_k < K
    mask_ck = real[:, None] & mask_k[None, :]
    here = (b * HV + hv) * T + begin
    there = (b * T + begin) * HV + hv
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    dU += here * V
    written += here * V
    states += (chunk * HV + hv) * K * V
    dstates += (chunk * HV + hv) * K * V
    dq += there * K
    dk += there * K
    dv += there * V
    beta_c = tl.load(beta + rows * stride_beta_t, mask=real, other=0.0).to(tl.float32)
    inverse_cc = tl.load(
        inverse + here * C + rows[:, None] * C + rows[None, :], mask=real[:, None] & real[None, :], other=0.0
    )
    dp_cc = tl.zeros([C, C], dtype=tl.float32)
    da_cc = tl.zeros([C, C], dtype=tl.float32)
    past_ck = tl.zeros([C, BK], dtype=tl.float32)
    y_ck = tl.zeros([C, BK], dtype=tl.float32)
    end_ck = tl.zeros([C, BK], dtype=tl.float32)
    dbeta_c = tl.zeros([C], dtype=tl.float32)
    to_all = 0.0
    for start in range(0, V, BV):
        in_v = start + tl.arange(0, BV)
        mask_cv = real[:, None] & (in_v < V)[None, :]
        mask_kv = mask_k[:, None] & (in_v < V)[None, :]
        offsets_cv = rows[:, None] * V + in_v[None, :]
        offsets_kv = in_k[:, None] * V + in_v[None, :]
        du_cv = tl.load(dU + offsets_cv, mask=mask_cv, other=0.0)
        new_cv = tl.load(written + offsets_cv, mask=mask_cv, other=0.0)
        do_cv = tl.load(do + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        s_kv = tl.load(states + offsets_kv, mask=mask_kv, other=0.0)
        ds_kv = tl.load(dstates + offsets_kv, mask=mask_kv, other=0.0)
        x_cv = tl.dot(tl.trans(inverse_cc), du_cv, input_precision=PRECISION)
        x_low = x_cv.to(low)
        if tile == 0:
            v_cv = tl.load(v + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
            dbeta_c += tl.sum(x_cv * v_cv.to(tl.float32), axis=1)
            dv_cv = (x_cv * beta_c[:, None]).to(dv.dtype.element_ty)
            tl.store(dv + rows[:, None] * (HV * V) + in_v[None, :], dv_cv, mask=mask_cv)
        dp_cc = tl.dot(do_cv, tl.trans(new_cv), dp_cc, input_precision=PRECISION)
        da_cc = tl.dot(x_low, tl.trans(new_cv), da_cc, input_precision=PRECISION)
        past_ck = tl.dot(do_cv, tl.trans(s_kv), past_ck, input_precision=PRECISION)
        y_ck = tl.dot(x_low, tl.trans(s_kv), y_ck, input_precision=PRECISION)
        end_ck = tl.dot(new_cv, tl.trans(ds_kv), end_ck, input_precision=PRECISION)
        to_all += tl.sum(tl.sum(s_kv.to(tl.float32) * ds_kv.to(tl.float32), axis=1), axis=0)

    # What came through the states, first: it frees the most registers.
    grown_c = tl.load(from_start + here + rows, mask=real, other=0.0)
    decay_c = tl.load(to_end + here + rows, mask=real, other=0.0)
    q_ck = tl.load(q + rows[:, None] * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
    k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
    past_ck = past_ck * (grown_c * scale)[:, None]
    dc = tl.sum(past_ck * q_ck.to(tl.float32), axis=1)
    dq_ck = past_ck
    y_ck = -y_ck * grown_c[:, None]
    stored = tl.sum(y_ck * k_ck.to(tl.float32), axis=1)
    end_ck = end_ck * decay_c[:, None]
    ended = tl.sum(end_ck * k_ck.to(tl.float32), axis=1)
    dk_ck = y_ck * beta_c[:, None] + end_ck
    dbeta_c += stored
    dc += stored * beta_c - ended

    c = tl.load(c_sum + here + rows, mask=real, other=0.0)
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    strict = (rows[:, None] > rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    dp_cc = tl.where(lower, dp_cc * D, 0.0) * scale
    da_cc = tl.where(strict, -da_cc * D, 0.0)
    if tile == 0:
        qk_cc = tl.zeros([C, C], dtype=tl.float32)
        kk_cc = tl.zeros([C, C], dtype=tl.float32)
        for start in range(0, K, BK):
            columns = start + tl.arange(0, BK)
            mask = real[:, None] & (columns < K)[None, :]
            q_part = tl.load(q + rows[:, None] * stride_q_t + columns[None, :], mask=mask, other=0.0)
            k_part = tl.load(k + rows[:, None] * stride_k_t + columns[None, :], mask=mask, other=0.0)
            qk_cc = tl.dot(q_part, tl.trans(k_part), qk_cc, input_precision=PRECISION)
            kk_cc = tl.dot(k_part, tl.trans(k_part), kk_cc, input_precision=PRECISION)
        dkk = da_cc * kk_cc
        dbeta_c += tl.sum(dkk, axis=1)
        dlog = dp_cc * qk_cc + dkk * beta_c[:, None]
        dc += tl.sum(dlog, axis=1) - tl.sum(dlog, axis=0)
    da_cc = da_cc * beta_c[:, None]
    dqk_low = dp_cc.to(low)
    dkk_low = (da_cc + tl.trans(da_cc)).to(low)
    dq_ck = tl.dot(dqk_low, k_ck, dq_ck, input_precision=PRECISION)
    dk_ck = tl.dot(dkk_low, k_ck, dk_ck, input_precision=PRECISION)
    dk_ck = tl.dot(tl.trans(dqk_low), q_ck, dk_ck, input_precision=PRECISION)
    # Every gate of the chunk reaches the state after it. One sum of a matrix: Triton 3.7 fails to compile, for
    # sm_100, a sum of the vector ``ended``.
    to_all *= tl.load(from_start + here + length - 1)
    dc = tl.where(real, dc, 0.0)
    after = tl.sum(tl.where(rows[:, None] >= rows[None, :], dc[:, None], 0.0) + ended[:, None], axis=0)
    gates = tile * stride_part + there + rows * HV
    tl.store(dg + gates, (after + to_all).to(dg.dtype.element_ty), mask=real)
    tl.store(dbeta + gates, dbeta_c.to(dbeta.dtype.element_ty), mask=real)
    offsets_ck = rows[:, None] * (HV * K) + in_k[None, :]
    tl.store(dq + offsets_ck, dq_ck.to(dq.dtype.element_ty), mask=mask_ck)
    tl.store(dk + offsets_ck, dk_ck.to(dk.dtype.element_ty), mask=mask_ck)


@triton.jit
def group_kernel(
    dq_parts, dk_parts, dq, dk, rows, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """``dq, dk [rows, K]`` from ``[rows, GROUP, K]``, added in fp32 in the order of the heads."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    in_k = tl.arange(0, BK)
    mask = (row < rows)[:, None] & (in_k < K)[None, :]
    part = row[:, None] * (GROUP * K) + in_k[None, :]
    q_sum = tl.zeros([BR, BK], dtype=tl.float32)
    k_sum = tl.zeros([BR, BK], dtype=tl.float32)
    for member in range(0, GROUP):
        q_sum += tl.load(dq_parts + part + member * K, mask=mask, other=0.0).to(tl.float32)
        k_sum += tl.load(dk_parts + part + member * K, mask=mask, other=0.0).to(tl.float32)
    out = row[:, None] * K + in_k[None, :]
    tl.store(dq + out, q_sum.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + out, k_sum.to(dk.dtype.element_ty), mask=mask)


def sum_groups(dq_parts: Tensor, dk_parts: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """``[B, T, HV, K]`` to ``[B, T, H, K]``; the parts themselves where every key has one value head."""
    B, T, HV, K = dq_parts.shape
    if HV == H:
        return dq_parts, dk_parts
    dq, dk = (torch.empty((B, T, H, K), dtype=x.dtype, device=x.device) for x in (dq_parts, dk_parts))
    BK = triton.next_power_of_2(K)
    BR = max(1, 2048 // BK)
    launch(group_kernel)[(triton.cdiv(B * T * H, BR),)](
        dq_parts=dq_parts, dk_parts=dk_parts, dq=dq, dk=dk, rows=B * T * H, GROUP=HV // H, K=K, BK=BK, BR=BR,
        num_warps=4,
    )  # fmt: skip
    return dq, dk


def reverse_scan(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, scale: float, table: ChunkTable, *,
    enter: Tensor | None, leave: Tensor | None, dstates: Tensor | None = None, dU: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches :func:`reverse_scan_kernel`; ``enter`` is that of each segment."""
    T, H, K = q.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(q, K, V, table.segments * HV if isinstance(table.segments, int) else None)
    launch(reverse_scan_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, W=x.W, E=x.E, from_start=x.from_start, to_end=x.to_end, do=do, enter=enter, leave=leave,
        dstates=dstates, dU=dU, scale=scale, T=T, **table.segment_arguments(),
        **strides_of("q", q), **strides_of("k", k), **strides_of("do", do),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def gradient_configuration(x: Tensor, K: int, V: int) -> dict[str, int]:
    """All of a key in one program up to 128 columns, by eight warps; less where operands are fp32 or the chip small."""
    wide = x.element_size() == 2 and chip_of(x).shared_memory > 120_000
    BK = max(16, min(128 if wide else 64, triton.next_power_of_2(K)))
    BV = max(16, min(32 if wide else 16, triton.next_power_of_2(V)))
    return {"BK": BK, "BV": BV, "num_warps": 8 if BK >= 64 else 4, "num_stages": 2}


def chunk_backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g, beta in their own dtypes, and of initial_state in fp32 (no rows without one)."""
    T = q.shape[1]
    rest = (initial_state, cu_seqlens, scale)
    if is_narrow(q, v):
        wide = [x.to(torch.float32) for x in (do, q, k, v)]
        dq, dk, dv, *others = chunk_backward(wide[0], dfinal_state, *wide[1:], g, beta, *rest)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *others
    if isinstance(T, int) and T == 1:
        # A length of one is a constant to Triton, which then drops the loop; version 3.6's code for what remains reads
        # shared memory out of range on Hopper.
        longer = (torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 1)) for x in (q, k, v, g, beta))
        longer_do = torch.nn.functional.pad(do, (0, 0, 0, 0, 0, 1))
        *grads, dS = chunk_backward(longer_do, dfinal_state, *longer, *rest)
        return (*(x[:, :1].contiguous() for x in grads), dS)
    K, V = q.shape[3], v.shape[3]
    q, k, v, do = aligned(q), aligned(k), aligned(v), aligned(do)
    states = (aligned_state(x, q, v) for x in (dfinal_state, initial_state))
    dq, dk, dv, dg, dbeta, dS = _backward(do, *states, q, k, v, g, beta, cu_seqlens, scale)
    dq, dk, dv = (x[..., :size].contiguous() for x, size in ((dq, K), (dk, K), (dv, V)))
    return dq, dk, dv, dg, dbeta, dS[:, :, :K, :V].contiguous()


def _backward(do, dfinal_state, initial_state, q, k, v, g, beta, cu_seqlens, scale) -> tuple[Tensor, ...]:
    """The same for aligned inputs of at least two tokens."""
    (B, T, H, K), (HV, V), device = q.shape, v.shape[2:], q.device
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dS = torch.empty((0 if initial_state is None else N, HV, K, V), dtype=torch.float32, device=device)
    # Tokens after the last packed sequence belong to none: their gradients are zeros.
    make = torch.empty if cu_seqlens is None else torch.zeros
    dq, dk, dv = (make((B, T, HV, x.shape[3]), dtype=x.dtype, device=device) for x in (q, k, v))
    configuration = gradient_configuration(q, K, V)
    tiles = triton.cdiv(K, configuration["BK"])
    parts = [x.dtype if tiles == 1 else torch.float32 for x in (g, beta)]
    dg, dbeta = (make((tiles, B, T, HV), dtype=dtype, device=device) for dtype in parts)
    if N == 0 or (isinstance(T, int) and T == 0):
        if initial_state is not None:
            dS.zero_() if dfinal_state is None else dS.copy_(dfinal_state)
        return *(torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k, v, g, beta)), dS
    table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens))
    x = intra_chunk(q, k, v, g, beta, table, scale, do)
    leave = None if initial_state is None else dS
    before, after = initial_state, dfinal_state
    if table.segment is not None:
        forth = maps(x, k, v, table, last=True)
        before = combine(forth, initial_state, None, q, T, table, reverse=False)
        back = Maps(forth.M, forth.B)  # B has been used: its memory takes that of the way back
        reverse_scan(x, do, q, k, scale, table, enter=None, leave=back.B)
        after = combine(back, dfinal_state, leave, q, T, table, reverse=True)
    states = torch.empty((table.chunks, HV, K, V), dtype=q.dtype, device=device)
    dstates, written = torch.empty_like(states), torch.empty_like(x.U)
    scan(x, q, k, v, scale, table, initial_state=before, states=states, written=written)
    dU = x.U
    reverse_scan(x, do, q, k, scale, table, enter=after, leave=leave, dstates=dstates, dU=dU)
    launch(gradient_kernel)[(table.chunks * HV * tiles,)](
        q=q, k=k, v=v, do=do, beta=beta, c_sum=x.c_sum, from_start=x.from_start, to_end=x.to_end, inverse=x.inverse,
        written=written, dU=dU, states=states, dstates=dstates, dq=dq, dk=dk, dv=dv, dg=dg, dbeta=dbeta,
        scale=scale, T=T, stride_part=B * T * HV, **table.arguments(), **strides_of("q", q), **strides_of("k", k),
        **strides_of("v", v), **strides_of("do", do), **strides_of("beta", beta),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip
    dg, dbeta = (part[0] if tiles == 1 else part.sum(0).to(x.dtype) for part, x in ((dg, g), (dbeta, beta)))
    return *sum_groups(dq, dk, H), dv, dg, dbeta, dS


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        q, k, v, g, beta, state, cu_seqlens = ahead_of_time_inputs(*shape)
        call = (torch.empty_like(v), state, q, k, v, g, beta, state, cu_seqlens, 0.1)
        cases += cases_of_call(f"chunk_backward {name}", chunk_backward, *call)
    return cases
