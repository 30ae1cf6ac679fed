"""The chunkwise gated delta rule on the GPU, backward. Nothing is saved by the forward but its inputs.

1. ``intra_chunk`` again, with ``E = P^T dO`` in place of ``P``.
2. **both_ways_kernel**: every other program is the forward scan, this time writing the state ``S`` before each chunk
   and ``V'``; the others, one a (segment, value head, tile of value columns), carry ``dS``, the gradient of the state
   after the chunk, from the last chunk to the first, and write it and ``dU``, the gradient of ``U`` and of ``V'``::

       dU = E + exp(c_C - c) * (K dS)          dS <- exp(c_C) dS + (scale * exp(c) * Q)^T dO - W^T dU

   Two of the three products are a chain; everything else stands outside the loop over chunks.
3. **value_gradient_kernel**, one program a (chunk, value head): everything with an extent of value columns::

       X = inverse^T dU     dV = beta * X     dP = scale * (dO V'^T) * D     dA = strict_lower(X V'^T) * D

   The gradient of the inverse, ``-inverse^T (dT) inverse^T``, needs no other product: U - W S is V', so what comes
   through U and through W adds to ``X V'^T``.
4. **key_gradient_kernel**, one program a (chunk, key head, tile of key columns), adds over the value heads of its key::

       R  = exp(c) * (X S^T) + dA K                                    (minus what the rows of the inverse pass on)
       dQ = scale * exp(c) * (dO S^T) + dP K
       dK = exp(c_C - c) * (V' dS^T) + dP^T Q - (beta * dA)^T K - beta * R

   Every exp(c_i) stands with row i of Q or of K, every exp(-c_j) with row j of K. So the gradients of the gates are
   row sums of what is there already: ``dbeta = X . V - R . K``, and of c, ``Q . dQ + (K in rows) . dK - (K in
   columns) . dK``, which a reverse cumulative sum turns into that of g.

Wide keys take several programs a chunk, which leave their parts of dg and dbeta to a sum in torch: no atomics.
Source of the chunk form: arXiv 2412.06464, section 3.3; the tests check the derivation against autograd.
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
    scan_configuration,
    scan_segment,
    two_tokens,
)
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, intra_chunk, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.segments import Maps, combine, maps, segment_length


@triton.jit
def reverse_segment(
    program,
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
    """The work of one program. ``enter`` is ``dS`` after each segment (None: zeros). With ``dstates`` None nothing is
    written but ``leave``, ``dS`` before each segment; else ``leave`` is that before each sequence, or None."""
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, _, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    h = hv // (HV // H)
    rows = tl.arange(0, C)
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    state_offsets = in_k[:, None] * V + in_v[None, :]

    length = tl.where(exists, end - begin, 0).to(tl.int32)
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
        enter += (segment * HV + hv) * K * V
        dS_kv = tl.load(enter + state_offsets, mask=mask_kv & exists, other=0.0).to(tl.float32)
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
            tl.store(leave + (segment * HV + hv) * K * V + state_offsets, dS_kv, mask=mask_kv & exists)
        else:
            if first & exists:
                tl.store(leave + (n * HV + hv) * K * V + state_offsets, dS_kv, mask=mask_kv)


@triton.jit
def reverse_map_kernel(
    q,
    k,
    W,
    E,
    from_start,
    to_end,
    do,
    leave,
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
    """``dS`` before each segment from zero after it: what the maps of ``segments.py`` need of the way back."""
    reverse_segment(
        tl.program_id(0), q, k, W, E, from_start, to_end, do, None, leave, None, None, cu_seqlens, chunk_offsets,
        segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
        stride_do_b, stride_do_t, stride_do_h, H, HV, K, V, BK, BV, C, PRECISION,
    )  # fmt: skip


@triton.jit
def both_ways_kernel(
    q,
    k,
    do,
    W,
    U,
    E,
    from_start,
    to_end,
    before,
    states,
    written,
    after,
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
    """The scan that writes ``states`` and ``written``, and the reverse scan, in turns: neither needs the other, and a
    scan's chain of products leaves room for a second one on the same multiprocessor."""
    program = tl.program_id(0)
    if program % 2 == 0:
        scan_segment(
            program // 2, q, k, W, U, None, from_start, to_end, None, before, None, states, written, cu_seqlens,
            chunk_offsets, segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b,
            stride_k_t, stride_k_h, H, HV, K, V, BK, BV, C, PRECISION,
        )  # fmt: skip
    else:
        reverse_segment(
            program // 2, q, k, W, E, from_start, to_end, do, after, leave, dstates, dU, cu_seqlens, chunk_offsets,
            segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t,
            stride_k_h, stride_do_b, stride_do_t, stride_do_h, H, HV, K, V, BK, BV, C, PRECISION,
        )  # fmt: skip


@triton.jit
def value_gradient_kernel(
    v,
    do,
    beta,
    c_sum,
    inverse,
    written,
    dU,
    dP,
    dv,
    dbeta,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    N,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_do_b,
    stride_do_t,
    stride_do_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    HV: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes ``X`` over ``dU``, ``dA * D`` over ``inverse``, ``scale * dP * D``, ``dv``, and its part of dbeta."""
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of((program // HV).to(tl.int64), T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    low = dU.dtype.element_ty
    rows = tl.arange(0, C)
    real = rows < length
    here = (b * HV + hv) * T + begin
    there = (b * T + begin) * HV + hv
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    dv += there * V
    dU += here * V
    written += here * V
    inverse += here * C
    dP += here * C
    square = rows[:, None] * C + rows[None, :]
    beta_c = tl.load(beta + rows * stride_beta_t, mask=real, other=0.0).to(tl.float32)
    c = tl.load(c_sum + here + rows, mask=real, other=0.0)
    inverse_cc = tl.load(inverse + square, mask=real[:, None] & real[None, :], other=0.0)
    dp_cc = tl.zeros([C, C], dtype=tl.float32)
    da_cc = tl.zeros([C, C], dtype=tl.float32)
    dbeta_c = tl.zeros([C], dtype=tl.float32)
    for start in range(0, V, BV):
        in_v = start + tl.arange(0, BV)
        mask_cv = real[:, None] & (in_v < V)[None, :]
        offsets_cv = rows[:, None] * V + in_v[None, :]
        du_cv = tl.load(dU + offsets_cv, mask=mask_cv, other=0.0)
        new_cv = tl.load(written + offsets_cv, mask=mask_cv, other=0.0)
        do_cv = tl.load(do + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        v_cv = tl.load(v + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
        x_cv = tl.dot(tl.trans(inverse_cc), du_cv, input_precision=PRECISION)
        x_low = x_cv.to(low)
        dp_cc = tl.dot(do_cv, tl.trans(new_cv), dp_cc, input_precision=PRECISION)
        da_cc = tl.dot(x_low, tl.trans(new_cv), da_cc, input_precision=PRECISION)
        dbeta_c += tl.sum(x_cv * v_cv.to(tl.float32), axis=1)
        tl.store(dU + offsets_cv, x_low, mask=mask_cv)
        dv_cv = (x_cv * beta_c[:, None]).to(dv.dtype.element_ty)
        tl.store(dv + rows[:, None] * (HV * V) + in_v[None, :], dv_cv, mask=mask_cv)
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    da_cc = tl.where(rows[:, None] > rows[None, :], da_cc * D, 0.0)
    tl.store(dP + square, (dp_cc * D * scale).to(low), mask=real[:, None])
    tl.store(inverse + square, da_cc.to(low), mask=real[:, None])
    tl.store(dbeta + there + rows * HV, dbeta_c, mask=real)


@triton.jit
def key_gradient_kernel(
    q,
    k,
    do,
    beta,
    from_start,
    to_end,
    written,
    X,
    dP,
    dA,
    states,
    dstates,
    dbeta_of_value,
    dq,
    dk,
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
    GROUP: tl.constexpr = HV // H
    program = tl.program_id(0)
    tile = program % NK
    h = (program // NK % H).to(tl.int64)
    chunk = (program // (NK * H)).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    low = q.dtype.element_ty
    rows = tl.arange(0, C)
    real = rows < length
    in_k = tile * BK + tl.arange(0, BK)
    mask_k = in_k < K
    mask_ck = real[:, None] & mask_k[None, :]
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    offsets_q = rows[:, None] * stride_q_t + in_k[None, :]
    offsets_k = rows[:, None] * stride_k_t + in_k[None, :]
    dq_ck = tl.zeros([C, BK], dtype=tl.float32)
    dk_ck = tl.zeros([C, BK], dtype=tl.float32)
    # q . dq and k . dk of the heads so far.
    had_q = tl.zeros([C], dtype=tl.float32)
    had_k = tl.zeros([C], dtype=tl.float32)
    for member in range(0, GROUP):
        hv = h * GROUP + member
        here = (b * HV + hv) * T + begin
        written_at = written + here * V
        X_at = X + here * V
        states_at = states + (chunk * HV + hv) * K * V
        dstates_at = dstates + (chunk * HV + hv) * K * V
        do_at = do + b * stride_do_b + begin * stride_do_t + hv * stride_do_h
        beta_at = beta + b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
        grown_c = tl.load(from_start + here + rows, mask=real, other=0.0)
        decay_c = tl.load(to_end + here + rows, mask=real, other=0.0)
        r_ck = tl.zeros([C, BK], dtype=tl.float32)
        to_all = 0.0
        for start in range(0, V, BV):
            in_v = start + tl.arange(0, BV)
            mask_cv = real[:, None] & (in_v < V)[None, :]
            mask_kv = mask_k[:, None] & (in_v < V)[None, :]
            offsets_cv = rows[:, None] * V + in_v[None, :]
            offsets_kv = in_k[:, None] * V + in_v[None, :]
            do_cv = tl.load(do_at + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
            x_cv = tl.load(X_at + offsets_cv, mask=mask_cv, other=0.0)
            new_cv = tl.load(written_at + offsets_cv, mask=mask_cv, other=0.0)
            s_kv = tl.load(states_at + offsets_kv, mask=mask_kv, other=0.0)
            ds_kv = tl.load(dstates_at + offsets_kv, mask=mask_kv, other=0.0)
            do_cv = (do_cv.to(tl.float32) * (grown_c * scale)[:, None]).to(low)
            x_cv = (x_cv.to(tl.float32) * grown_c[:, None]).to(low)
            new_cv = (new_cv.to(tl.float32) * decay_c[:, None]).to(low)
            dq_ck = tl.dot(do_cv, tl.trans(s_kv), dq_ck, input_precision=PRECISION)
            r_ck = tl.dot(x_cv, tl.trans(s_kv), r_ck, input_precision=PRECISION)
            dk_ck = tl.dot(new_cv, tl.trans(ds_kv), dk_ck, input_precision=PRECISION)
            to_all += tl.sum(tl.sum(s_kv.to(tl.float32) * ds_kv.to(tl.float32), axis=1), axis=0)
        square = rows[:, None] * C + rows[None, :]
        k_ck = tl.load(k + offsets_k, mask=mask_ck, other=0.0)
        dp_cc = tl.load(dP + here * C + square, mask=real[:, None], other=0.0)
        da_cc = tl.load(dA + here * C + square, mask=real[:, None], other=0.0)
        beta_c = tl.load(beta_at + rows * stride_beta_t, mask=real, other=0.0).to(tl.float32)
        ended = tl.sum(dk_ck * k_ck.to(tl.float32), axis=1) - had_k
        r_ck = tl.dot(da_cc, k_ck, r_ck, input_precision=PRECISION)
        dq_ck = tl.dot(dp_cc, k_ck, dq_ck, input_precision=PRECISION)
        as_row = -tl.sum(r_ck * k_ck.to(tl.float32), axis=1)
        da_cc = (da_cc.to(tl.float32) * -beta_c[:, None]).to(low)
        dk_ck = tl.dot(tl.trans(da_cc), k_ck, dk_ck, input_precision=PRECISION)
        q_ck = tl.load(q + offsets_q, mask=mask_ck, other=0.0)
        dk_ck = tl.dot(tl.trans(dp_cc), q_ck, dk_ck, input_precision=PRECISION)
        as_query = tl.sum(dq_ck * q_ck.to(tl.float32), axis=1) - had_q
        as_column = tl.sum(dk_ck * k_ck.to(tl.float32), axis=1) - had_k
        dk_ck -= r_ck * beta_c[:, None]
        had_q += as_query
        had_k += as_column + as_row * beta_c

        there = (b * T + begin) * HV + hv
        gates = tile * stride_part + there
        dc = tl.where(real, as_query + as_row * beta_c - as_column, 0.0)
        to_all *= tl.load(from_start + here + length - 1)
        # Every gate of the chunk reaches the state after it. One sum of a matrix: Triton 3.7 fails to compile, for
        # sm_100, a sum of the vector ``ended``.
        after = tl.sum(tl.where(rows[:, None] >= rows[None, :], dc[:, None], 0.0) + ended[:, None], axis=0)
        as_row += tl.load(dbeta_of_value + there + rows * HV, mask=real & (tile == 0), other=0.0)
        tl.store(dg + gates + rows * HV, (after + to_all).to(dg.dtype.element_ty), mask=real)
        tl.store(dbeta + gates + rows * HV, as_row.to(dbeta.dtype.element_ty), mask=real)
    dq += ((b * T + begin) * H + h) * K
    dk += ((b * T + begin) * H + h) * K
    out = rows[:, None] * (H * K) + in_k[None, :]
    tl.store(dq + out, dq_ck.to(dq.dtype.element_ty), mask=mask_ck)
    tl.store(dk + out, dk_ck.to(dk.dtype.element_ty), mask=mask_ck)


def reverse_maps(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, scale: float, table: ChunkTable, leave: Tensor
) -> None:
    """Launches :func:`reverse_map_kernel`."""
    T, H, K = q.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(q, K, V, table.segments * HV if isinstance(table.segments, int) else None)
    launch(reverse_map_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, W=x.W, E=x.E, from_start=x.from_start, to_end=x.to_end, do=do, leave=leave, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k), **strides_of("do", do),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def scan_both_ways(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, scale: float, table: ChunkTable, *,
    before: Tensor | None, after: Tensor | None, leave: Tensor | None,
    states: Tensor, written: Tensor, dstates: Tensor, dU: Tensor,
) -> None:  # fmt: skip
    """Launches :func:`both_ways_kernel`; ``before`` and ``after`` are those of each segment. ``dU`` may not be ``U``:
    one way reads what the other would have written."""
    T, H, K = q.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(q, K, V, 2 * table.segments * HV if isinstance(table.segments, int) else None)
    launch(both_ways_kernel)[(2 * table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, do=do, W=x.W, U=x.U, E=x.E, from_start=x.from_start, to_end=x.to_end, before=before, after=after,
        leave=leave, states=states, written=written, dstates=dstates, dU=dU, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k), **strides_of("do", do),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def value_gradient_configuration(x: Tensor, V: int) -> dict[str, int]:
    """Measured on an H100 (16/32 heads, 8192 tokens, bf16): the whole backward takes 1.41 ms with 32 columns, 1.33 ms
    with 64; three stages or eight warps gain less."""
    widest, warps = (64 if chip_of(x).shared_memory > 200_000 else 32, 4) if x.element_size() == 2 else (32, 8)
    return {"BV": max(16, min(widest, triton.next_power_of_2(V))), "num_warps": warps, "num_stages": 2}


def key_gradient_configuration(x: Tensor, K: int, V: int) -> dict[str, int]:
    """Three accumulators ``[C, BK]``: 64 columns leave registers for two blocks a multiprocessor.

    Measured on an H100 (16/32 heads, 8192 tokens, bf16), by BK, BV, warps: .434 ms with 64, 64, 4; .489 with 64, 32,
    4; .569 with 128, 32, 8; .753 with 64, 32, 8. Products of fp32 operands keep them in registers besides: 32 columns
    by eight warps spill .5 KB a thread, 64 by four 31 KB; and where there is no warpgroup product (sm_80), 64 columns
    of values spill 21 KB.
    """
    wide = 64 if chip_of(x).shared_memory > 200_000 else 32
    BK, BV, warps = (64, wide, 4) if x.element_size() == 2 else (32, 32, 8)
    BK, BV = (max(16, min(widest, triton.next_power_of_2(width))) for widest, width in ((BK, K), (BV, V)))
    return {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": 2}


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
        *grads, dS = chunk_backward(two_tokens(do), dfinal_state, *map(two_tokens, (q, k, v, g, beta)), *rest)
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
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    configuration = key_gradient_configuration(q, K, V)
    tiles = triton.cdiv(K, configuration["BK"])
    parts = [x.dtype if tiles == 1 else torch.float32 for x in (g, beta)]
    dg, dbeta = (make((tiles, B, T, HV), dtype=dtype, device=device) for dtype in parts)
    if N == 0 or (isinstance(T, int) and T == 0):
        if initial_state is not None:
            dS.zero_() if dfinal_state is None else dS.copy_(dfinal_state)
        return *(torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k, v, g, beta)), dS
    table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens, ways=2))
    x = intra_chunk(q, k, v, g, beta, table, scale, do)
    leave = None if initial_state is None else dS
    before, after = initial_state, dfinal_state
    if table.segment is not None:
        forth = maps(x, k, v, table, last=True)
        before = combine(forth, initial_state, None, q, T, table, reverse=False)
        back = Maps(forth.M, forth.B)  # B has been used: its memory takes that of the way back
        reverse_maps(x, do, q, k, scale, table, leave=back.B)
        after = combine(back, dfinal_state, leave, q, T, table, reverse=True)
    states = torch.empty((table.chunks, HV, K, V), dtype=q.dtype, device=device)
    dstates, written, dU = torch.empty_like(states), torch.empty_like(x.U), torch.empty_like(x.U)
    scan_both_ways(
        x, do, q, k, scale, table, before=before, after=after, leave=leave, states=states, written=written,
        dstates=dstates, dU=dU,
    )  # fmt: skip
    dP, dbeta_of_value = torch.empty_like(x.inverse), torch.empty((B, T, HV), dtype=torch.float32, device=device)
    shape = {"scale": scale, "T": T, "HV": HV, "V": V, "C": CHUNK, "PRECISION": precision_of(q), **table.arguments()}
    shape |= {**strides_of("do", do), **strides_of("beta", beta)}
    launch(value_gradient_kernel)[(table.chunks * HV,)](
        v=v, do=do, beta=beta, c_sum=x.c_sum, inverse=x.inverse, written=written, dU=dU, dP=dP, dv=dv,
        dbeta=dbeta_of_value, **strides_of("v", v), **value_gradient_configuration(q, V), **shape,
    )  # fmt: skip
    launch(key_gradient_kernel)[(table.chunks * H * tiles,)](
        q=q, k=k, do=do, beta=beta, from_start=x.from_start, to_end=x.to_end, written=written, X=dU, dP=dP,
        dA=x.inverse, states=states, dstates=dstates, dbeta_of_value=dbeta_of_value, dq=dq, dk=dk, dg=dg, dbeta=dbeta,
        stride_part=B * T * HV, **strides_of("q", q), **strides_of("k", k), H=H, K=K, **configuration, **shape,
    )  # fmt: skip
    dg, dbeta = (part[0] if tiles == 1 else part.sum(0).to(x.dtype) for part, x in ((dg, g), (dbeta, beta)))
    return dq, dk, dv, dg, dbeta, dS


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        q, k, v, g, beta, state, cu_seqlens = ahead_of_time_inputs(*shape)
        call = (torch.empty_like(v), state, q, k, v, g, beta, state, cu_seqlens, 0.1)
        cases += cases_of_call(f"chunk_backward {name}", chunk_backward, *call)
    return cases
