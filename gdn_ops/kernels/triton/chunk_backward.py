"""The chunkwise gated delta rule on the GPU, backward. Nothing is saved by the forward but its inputs.

1. ``intra_chunk`` again, with the inverse beside ``T`` and ``scale * exp(c) * Q``.
2. **both_ways_kernel**: every other program is the forward scan, this time writing the state ``S`` before each chunk
   and ``V'``; the others, one a (segment, value head, tile of value columns), carry ``dS``, the gradient of the state
   after the chunk, from the last chunk to the first, and write it and ``X``, values first like the scan::

       dV'^T = dO^T P + (exp(c_C - c) * (dS^T K^T))        X^T = dV'^T inverse
       dS^T <- exp(c_C) dS^T + dO^T (scale * exp(c) * Q) - (beta * exp(c) * X^T) K

   Three of the five products are a chain, and pass no shared memory.
3. **value_gradient_kernel**, one program a (chunk, value head): everything else with an extent of value columns::

       dV = beta * X     dP = scale * (dO V'^T) * D     dA = strict_lower(X V'^T) * D

   The gradient of the inverse, ``-inverse^T (dT) inverse^T``, needs no other product: what comes through the values and
   what comes through the keys adds to ``X V'^T``.
4. **key_gradient_kernel**, one program a (chunk, key head, tile of key columns), adds over the value heads of its key,
   first for dQ, then for dK::

       R  = exp(c) * (X S^T) + dA K                                    (minus what the rows of the inverse pass on)
       dQ = scale * exp(c) * (dO S^T) + dP K
       dK = exp(c_C - c) * (V' dS^T) + dP^T Q - (beta * dA)^T K - beta * R

   Every exp(c_i) stands with row i of Q or of K, every exp(-c_j) with row j of K. So the gradients of the gates are
   row sums of what is there already: ``dbeta = X . V - R . K``, and of c, ``Q . dQ + (K in rows) . dK - (K in
   columns) . dK``, which a reverse cumulative sum turns into that of g.

Wide keys take several programs a chunk, which leave their parts of dg and dbeta to a sum in torch: no atomics. Parts of
a large call take turns in the same memory (``groups.py``).
Source of the chunk form: arXiv 2412.06464, section 3.3; the tests check the derivation against autograd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels import hopper
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
from gdn_ops.kernels.triton.groups import groups
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, intra_chunk, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.segments import combine, maps, segment_length


@triton.jit
def reverse_segment(
    program,
    k,
    grown_q,
    inverse,
    P,
    erasing,
    from_start,
    to_end,
    do,
    enter,
    leave,
    dstates,
    X,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    T,
    N,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_do_b,
    stride_do_t: tl.constexpr,
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
    """The work of one program. ``enter`` is ``dS`` after each segment, ``leave`` that before each sequence, or None.

    With ``dstates`` None this is a map: ``enter`` is ``dS`` after each sequence, all segments but its last start from
    zero, and nothing is written but ``leave``, ``dS`` before each but its first. ``enter`` may be None: zeros.
    """
    MAP: tl.constexpr = dstates is None
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    if MAP:
        exists = exists & (not first)
    h = hv // (HV // H)
    rows = tl.arange(0, C)
    square = rows[:, None] * C + rows[None, :]
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    mask_vk = mask_v[:, None] & mask_k[None, :]
    state_offsets = in_v[:, None] + in_k[None, :] * V

    length = tl.where(exists, end - begin, 0).to(tl.int32)
    chunks = (length + C - 1) // C
    token = begin + (chunks - 1) * C
    k += b * stride_k_b + token * stride_k_t + h * stride_k_h
    do += b * stride_do_b + token * stride_do_t + hv * stride_do_h
    here = (first_chunk + chunks - 1) * HV + hv
    grown_q += here * C * K
    inverse += here * C * C
    P += here * C * C
    erasing += here * C
    from_start += here * C
    to_end += here * C
    if not MAP:
        X += here * C * V
        dstates += here * K * V

    if enter is None:
        dS_vk = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        enter += ((n if MAP else segment) * HV + hv) * K * V
        entered = exists & last if MAP else exists
        dS_vk = tl.load(enter + state_offsets, mask=mask_vk & entered, other=0.0).to(tl.float32)
    for i in range(0, chunks):
        real = rows < length - (chunks - 1 - i) * C
        do_cv = tl.load(
            do + rows[:, None] * stride_do_t + in_v[None, :], mask=real[:, None] & mask_v[None, :], other=0.0
        )
        p_cc = tl.load(P + square)
        k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=real[:, None] & mask_k[None, :], other=0.0)
        inverse_cc = tl.load(inverse + square)
        q_ck = tl.load(grown_q + rows[:, None] * K + in_k[None, :], mask=mask_k[None, :], other=0.0)
        decay_c = tl.load(to_end + rows)
        whole = tl.load(from_start + C - 1)
        erasing_c = tl.load(erasing + rows)
        dS_low = dS_vk.to(k_ck.dtype)
        e_vc = tl.dot(tl.trans(do_cv), p_cc, input_precision=PRECISION)
        kept_vc = tl.dot(dS_low, tl.trans(k_ck), input_precision=PRECISION)
        # Not by +, which would make the other product wait for this one and add to it.
        dnew_vc = tl.fma(kept_vc, tl.broadcast_to(decay_c[None, :], [BV, C]), e_vc)
        x_vc = tl.dot(dnew_vc.to(k_ck.dtype), tl.trans(inverse_cc), input_precision=PRECISION)
        if not MAP:
            tl.store(dstates + in_v[:, None] * K + in_k[None, :], dS_low, mask=mask_vk)
            tl.store(X + in_v[:, None] * C + rows[None, :], x_vc.to(X.dtype.element_ty), mask=mask_v[:, None])
            X -= HV * C * V
            dstates -= HV * K * V
        dS_vk = tl.dot(tl.trans(do_cv), q_ck, dS_vk * whole, input_precision=PRECISION)
        dS_vk = tl.dot((x_vc * erasing_c[None, :]).to(k_ck.dtype), k_ck, dS_vk, input_precision=PRECISION)
        k -= C * stride_k_t
        do -= C * stride_do_t
        grown_q -= HV * C * K
        inverse -= HV * C * C
        P -= HV * C * C
        erasing -= HV * C
        from_start -= HV * C
        to_end -= HV * C
    if leave is not None:
        if MAP:
            tl.store(leave + (segment * HV + hv) * K * V + state_offsets, dS_vk, mask=mask_vk & exists)
        else:
            if first & exists:
                tl.store(leave + (n * HV + hv) * K * V + state_offsets, dS_vk, mask=mask_vk)


@triton.jit
def reverse_map_kernel(
    k,
    grown_q,
    inverse,
    P,
    erasing,
    from_start,
    to_end,
    do,
    enter,
    leave,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    T,
    N,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_do_b,
    stride_do_t: tl.constexpr,
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
    """What the maps of ``segments.py`` need of the way back: ``dS`` before each segment but a sequence's first. It is
    ``enter [N, HV, K, V]`` (None: zeros) after the last and zero after the others."""
    reverse_segment(
        tl.program_id(0), k, grown_q, inverse, P, erasing, from_start, to_end, do, enter, leave, None, None, cu_seqlens,
        chunk_offsets, segment_offsets, SEGMENT, T, N, stride_k_b, stride_k_t, stride_k_h, stride_do_b, stride_do_t,
        stride_do_h, H, HV, K, V, BK, BV, C, PRECISION,
    )  # fmt: skip


@triton.jit
def both_ways_kernel(
    k,
    v,
    do,
    grown_q,
    transition,
    inverse,
    P,
    erasing,
    from_start,
    to_end,
    before,
    states,
    written,
    after,
    leave,
    dstates,
    X,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    T,
    N,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
    stride_do_b,
    stride_do_t: tl.constexpr,
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
            program // 2, k, k, v, transition, None, from_start, to_end, None, before, None, states, written,
            cu_seqlens, chunk_offsets, segment_offsets, SEGMENT, 1.0, T, N, stride_k_b, stride_k_t, stride_k_h,
            stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h, H, HV, K, V, BK, BV, C, PRECISION,
        )  # fmt: skip
    else:
        reverse_segment(
            program // 2, k, grown_q, inverse, P, erasing, from_start, to_end, do, after, leave, dstates, X, cu_seqlens,
            chunk_offsets, segment_offsets, SEGMENT, T, N, stride_k_b, stride_k_t, stride_k_h, stride_do_b,
            stride_do_t, stride_do_h, H, HV, K, V, BK, BV, C, PRECISION,
        )  # fmt: skip


@triton.jit
def value_gradient_kernel(
    v,
    do,
    c_sum,
    beta,
    written,
    X,
    dP,
    dA,
    dv,
    dbeta,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    N,
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
    stride_do_b,
    stride_do_t: tl.constexpr,
    stride_do_h,
    HV: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes ``scale * dP * D``, ``dA * D``, ``dv``, and its part of dbeta."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of((program // HV).to(tl.int64), T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    rows = tl.arange(0, C)
    real = rows < length
    here = program.to(tl.int64) * C
    there = (b * T + begin) * HV + hv
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h
    X += here * V
    written += here * V
    dv += there * V
    beta_c = tl.load(beta + here + rows)
    one = tl.where(length > 0, 1.0, 0.0)
    dp_cc = tl.zeros([C, C], dtype=tl.float32)
    da_cc = tl.zeros([C, C], dtype=tl.float32)
    dbeta_c = tl.zeros([C], dtype=tl.float32)
    for start in range(0, V, BV):
        in_v = start + tl.arange(0, BV)
        mask_v = in_v < V
        mask_cv = real[:, None] & mask_v[None, :]
        offsets_vc = in_v[:, None] * C + rows[None, :]
        x_vc = tl.load(X + offsets_vc, mask=mask_v[:, None], other=0.0)
        new_vc = tl.load(written + offsets_vc, mask=mask_v[:, None], other=0.0)
        do_cv = tl.load(do + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        v_cv = tl.load(v + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
        dp_cc = tl.dot(do_cv, new_vc, dp_cc, input_precision=PRECISION) * one  # see key_gradient_kernel
        da_cc = tl.dot(tl.trans(x_vc), new_vc, da_cc, input_precision=PRECISION) * one
        x_cv = tl.trans(x_vc).to(tl.float32)
        dbeta_c += tl.sum(x_cv * v_cv.to(tl.float32), axis=1)
        dv_cv = (x_cv * beta_c[:, None]).to(dv.dtype.element_ty)
        tl.store(dv + rows[:, None] * (HV * V) + in_v[None, :], dv_cv, mask=mask_cv)
    low = dP.dtype.element_ty
    square = here * C + rows[:, None] * C + rows[None, :]
    c = tl.load(c_sum + here + rows)
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    da_cc = tl.where(rows[:, None] > rows[None, :], da_cc * D, 0.0)
    tl.store(dP + square, (dp_cc * D * scale).to(low))
    tl.store(dA + square, da_cc.to(low))
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
    dc,
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
    stride_q_t: tl.constexpr,
    stride_q_h,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_do_b,
    stride_do_t: tl.constexpr,
    stride_do_h,
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
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
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
    one = tl.where(length > 0, 1.0, 0.0)
    rows = tl.arange(0, C)
    real = rows < length
    square = rows[:, None] * C + rows[None, :]
    in_k = tile * BK + tl.arange(0, BK)
    mask_k = in_k < K
    mask_ck = real[:, None] & mask_k[None, :]
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    q_ck = tl.load(q + rows[:, None] * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
    k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
    dq_ck = tl.zeros([C, BK], dtype=tl.float32)
    for member in range(0, GROUP):
        hv = h * GROUP + member
        here = (chunk * HV + hv) * C
        states_at = states + (chunk * HV + hv) * K * V
        do_at = do + b * stride_do_b + begin * stride_do_t + hv * stride_do_h
        # Of this member; what multiplies a row is applied when the sum over the values is there.
        toward_q = tl.zeros([C, BK], dtype=tl.float32)
        for start in range(0, V, BV):
            in_v = start + tl.arange(0, BV)
            mask_v = in_v < V
            mask_cv = real[:, None] & mask_v[None, :]
            do_cv = tl.load(do_at + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
            s_vk = tl.load(
                states_at + in_v[:, None] * K + in_k[None, :], mask=mask_v[:, None] & mask_k[None, :], other=0.0
            )
            toward_q = tl.dot(do_cv, s_vk, toward_q, input_precision=PRECISION)
        grown_c = tl.load(from_start + here + rows)
        dp_cc = tl.load(dP + here * C + square)
        toward_q = tl.dot(dp_cc, k_ck, toward_q * (grown_c * scale)[:, None], input_precision=PRECISION)
        as_query = tl.sum(toward_q * q_ck.to(tl.float32), axis=1)
        dq_ck += toward_q
        # The queries' part of the gradient of c, for the other half of this kernel.
        tl.store(dc + tile * stride_part + (b * T + begin) * HV + hv + rows * HV, as_query, mask=real)
    out = ((b * T + begin) * H + h) * K + rows[:, None] * (H * K) + in_k[None, :]
    tl.store(dq + out, dq_ck.to(dq.dtype.element_ty), mask=mask_ck)
    tl.debug_barrier()  # other threads may read what these have written to dc

    dk_ck = tl.zeros([C, BK], dtype=tl.float32)
    for member in range(0, GROUP):
        hv = h * GROUP + member
        here = (chunk * HV + hv) * C
        written_at = written + here * V
        X_at = X + here * V
        states_at = states + (chunk * HV + hv) * K * V
        dstates_at = dstates + (chunk * HV + hv) * K * V
        toward_k = tl.zeros([C, BK], dtype=tl.float32)
        r_ck = tl.zeros([C, BK], dtype=tl.float32)
        to_all_v = tl.zeros([BV], dtype=tl.float32)
        for start in range(0, V, BV):
            in_v = start + tl.arange(0, BV)
            mask_v = in_v < V
            mask_vk = mask_v[:, None] & mask_k[None, :]
            offsets_vc = in_v[:, None] * C + rows[None, :]
            offsets_vk = in_v[:, None] * K + in_k[None, :]
            x_vc = tl.load(X_at + offsets_vc, mask=mask_v[:, None], other=0.0)
            new_vc = tl.load(written_at + offsets_vc, mask=mask_v[:, None], other=0.0)
            s_vk = tl.load(states_at + offsets_vk, mask=mask_vk, other=0.0)
            ds_vk = tl.load(dstates_at + offsets_vk, mask=mask_vk, other=0.0)
            # By one, so that they end here: what is also read below must not be overwritten while a product runs.
            r_ck = tl.dot(tl.trans(x_vc), s_vk, r_ck, input_precision=PRECISION) * one
            toward_k = tl.dot(tl.trans(new_vc), ds_vk, toward_k, input_precision=PRECISION) * one
            to_all_v += tl.sum(s_vk.to(tl.float32) * ds_vk.to(tl.float32), axis=1)
        grown_c = tl.load(from_start + here + rows)
        beta_c = tl.load(beta + here + rows)
        whole = tl.load(from_start + here + C - 1)
        toward_k *= tl.load(to_end + here + rows)[:, None]
        ended = tl.sum(toward_k * k_ck.to(tl.float32), axis=1)
        dp_cc = tl.load(dP + here * C + square)
        toward_k = tl.dot(tl.trans(dp_cc), q_ck, toward_k, input_precision=PRECISION)
        da_cc = tl.load(dA + here * C + square)
        r_ck = tl.dot(da_cc, k_ck, r_ck * grown_c[:, None], input_precision=PRECISION)
        as_row = -tl.sum(r_ck * k_ck.to(tl.float32), axis=1)
        dk_ck -= r_ck * beta_c[:, None]
        da_cc = (da_cc.to(tl.float32) * -beta_c[:, None]).to(low)
        toward_k = tl.dot(tl.trans(da_cc), k_ck, toward_k, input_precision=PRECISION)
        as_column = tl.sum(toward_k * k_ck.to(tl.float32), axis=1)
        dk_ck += toward_k

        there = (b * T + begin) * HV + hv
        gates = tile * stride_part + there
        as_query = tl.load(dc + gates + rows * HV, mask=real, other=0.0)
        of_c = tl.where(real, as_query + as_row * beta_c - as_column, 0.0)
        to_all = tl.sum(to_all_v, axis=0) * whole
        # Every gate of the chunk reaches the state after it. One sum of a matrix: Triton 3.7 fails to compile, for
        # sm_100, a sum of the vector ``ended``.
        after = tl.sum(tl.where(rows[:, None] >= rows[None, :], of_c[:, None], 0.0) + ended[:, None], axis=0)
        as_row += tl.load(dbeta_of_value + there + rows * HV, mask=real & (tile == 0), other=0.0)
        tl.store(dg + gates + rows * HV, (after + to_all).to(dg.dtype.element_ty), mask=real)
        tl.store(dbeta + gates + rows * HV, as_row.to(dbeta.dtype.element_ty), mask=real)
    tl.store(dk + out, dk_ck.to(dk.dtype.element_ty), mask=mask_ck)


def reverse_maps(
    x: IntraChunk, do: Tensor, k: Tensor, table: ChunkTable, *, enter: Tensor | None, leave: Tensor
) -> None:
    """Launches :func:`reverse_map_kernel`."""
    T, H, K = k.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(k, K, V, table.heads(HV))
    launch(reverse_map_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        k=k, grown_q=x.grown_q, inverse=x.inverse, P=x.P, erasing=x.erasing, from_start=x.from_start,
        to_end=x.to_end, do=do, enter=enter, leave=leave, T=T, **table.segment_arguments(), **strides_of("k", k),
        **strides_of("do", do), H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(k), **configuration,
    )  # fmt: skip


def scan_both_ways(
    x: IntraChunk, do: Tensor, k: Tensor, v: Tensor, table: ChunkTable, *,
    before: Tensor | None, after: Tensor | None, leave: Tensor | None,
    states: Tensor, written: Tensor, dstates: Tensor, X: Tensor,
) -> None:  # fmt: skip
    """Launches :func:`both_ways_kernel`; ``before`` and ``after`` are those of each segment."""
    T, H, K = k.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(k, K, V, table.heads(HV, ways=2))
    launch(both_ways_kernel)[(2 * table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        k=k, v=v, do=do, grown_q=x.grown_q, transition=x.T, inverse=x.inverse, P=x.P, erasing=x.erasing,
        from_start=x.from_start, to_end=x.to_end, before=before, after=after, leave=leave, states=states,
        written=written, dstates=dstates, X=X, T=T, **table.segment_arguments(),
        **strides_of("k", k), **strides_of("v", v), **strides_of("do", do),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(k), **configuration,
    )  # fmt: skip


def value_gradient_configuration(x: Tensor, V: int) -> dict[str, int]:
    """Measured on an H100 (16/32 heads, 8192 tokens, bf16), by BV, warps, stages: .135 ms with 128, 8, 2; .149 with 64,
    4, 2; .158 with 64, 4, 3; .162 with 32, 4, 3; .193 with 64, 8, 2."""
    low, large = x.element_size() == 2, chip_of(x).large
    BV = max(16, min((128 if large else 32) if low else 32, triton.next_power_of_2(V)))
    return {"BV": BV, "num_warps": 4 if low and BV <= 64 else 8, "num_stages": 2}


def key_gradient_configuration(x: Tensor, K: int, V: int) -> dict[str, int]:
    """Three accumulators ``[C, BK]``: 64 columns leave registers for two blocks a multiprocessor.

    Measured on an H100 (16/32 heads, 8192 tokens, bf16), by BK, BV, warps, stages: .354 ms with 64, 64, 4, 3; .386 with
    two stages; .389 with 64, 32, 4, 4; .403 with 64, 128, 4, 1; .519 with 128, 64, 8, 2; .534 with 32, 64, 4, 3.
    Products of fp32 operands keep them in registers besides: 32 columns by eight warps spill .5 KB a thread, 64 by four
    31 KB; and where there is no warpgroup product (sm_80), 64 columns of values spill 21 KB.
    """
    wide = 64 if chip_of(x).large else 32
    BK, BV, warps = (64, wide, 4) if x.element_size() == 2 else (32, 32, 8)
    BK, BV = (max(16, min(widest, triton.next_power_of_2(width))) for widest, width in ((BK, K), (BV, V)))
    return {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": 3 if BV == 64 and warps == 4 else 2}


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


def stays_whole(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale) -> bool:
    """Whether a compiled graph leaves this call of ``chunk_backward`` as it is."""
    return hopper.serves_whole(q, v, cu_seqlens, gradients=True)


def _backward(do, dfinal_state, initial_state, q, k, v, g, beta, cu_seqlens, scale) -> tuple[Tensor, ...]:
    """The same for aligned inputs of at least two tokens, group by group."""
    (B, T, H, K), (HV, V), device = q.shape, v.shape[2:], q.device
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dS = torch.empty((0 if initial_state is None else N, HV, K, V), dtype=torch.float32, device=device)
    if N == 0 or (isinstance(T, int) and T == 0):
        if initial_state is not None:
            dS.zero_() if dfinal_state is None else dS.copy_(dfinal_state)
        return *(torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k, v, g, beta)), dS
    on_hopper = hopper.serves_gradients(q, k, v, do, scale, cu_seqlens)
    rest = (cu_seqlens, scale, on_hopper)
    states = (dfinal_state, initial_state, None if initial_state is None else dS)
    parts = groups(q, v, cu_seqlens, by_heads=on_hopper)
    if len(parts) == 1:
        return *_group(do, *states, q, k, v, g, beta, *rest), dS
    dq, dk, dv, dg, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v, g, beta))
    for rows, heads in parts:
        of_values = slice(heads.start * (HV // H), heads.stop * (HV // H))
        keys, values = (rows, slice(None), heads), (rows, slice(None), of_values)
        # Contiguous, for heads are parted within a row.
        some = (None if x is None else x[rows, of_values] for x in states)
        inputs = (q[keys], k[keys], v[values], g[values], beta[values])
        outputs = {"dq": dq[keys], "dk": dk[keys], "dv": dv[values]}
        *_, dg[values], dbeta[values] = _group(do[values], *some, *inputs, *rest, **outputs)
    return dq, dk, dv, dg, dbeta, dS


def _group(
    do, dfinal_state, initial_state, leave, q, k, v, g, beta, cu_seqlens, scale, on_hopper, dq=None, dk=None, dv=None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, beta; that of the initial state goes into ``leave`` (or None). Where ``dq, dk, dv`` are
    not given, they are made when they are needed, in memory that is free by then."""
    (B, T, H, K), (HV, V), device = q.shape, v.shape[2:], q.device
    # Tokens after the last packed sequence belong to none: their gradients are zeros.
    make = torch.empty if cu_seqlens is None else torch.zeros

    def place(given: Tensor | None, like: Tensor) -> Tensor:
        return make(like.shape, dtype=like.dtype, device=device) if given is None else given

    if on_hopper:  # loaded where they serve: another version of Triton may not have what they need
        from gdn_ops.kernels.hopper.backward import backward

        dq, dk, dv = place(dq, q), place(dk, k), place(dv, v)
        dg, dbeta = backward(do, dfinal_state, initial_state, leave, q, k, v, g, beta, scale, dq, dk, dv)
        return dq, dk, dv, dg, dbeta
    table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens, ways=2))
    before, after = initial_state, dfinal_state
    x = intra_chunk(q, k, g, beta, table, scale, backward=True)
    if table.segment is not None:
        segments = maps(x, k, v, table, initial_state)
        before = combine(segments, initial_state, None, q, T, table, reverse=False)
        # M is that of the way back, too; B has been used, and its memory takes the other one.
        reverse_maps(x, do, k, table, enter=dfinal_state, leave=segments.B)
        after = combine(segments, dfinal_state, leave, q, T, table, reverse=True)
        del segments
    states = torch.empty((table.chunks, HV, V, K), dtype=q.dtype, device=device)
    written = torch.empty((table.chunks, HV, V, CHUNK), dtype=q.dtype, device=device)
    dstates = torch.empty_like(states)
    X = torch.empty_like(written)
    scan_both_ways(
        x, do, k, v, table, before=before, after=after, leave=leave, states=states, written=written, dstates=dstates,
        X=X,
    )  # fmt: skip
    # The inverse and P have been used: their memory takes dA and dP; that of T and grown_q is free for what follows.
    dP, dA = x.P, x.inverse
    x = x._replace(T=None, grown_q=None, P=None, inverse=None)
    dq, dk, dv = place(dq, q), place(dk, k), place(dv, v)
    dbeta_of_value = torch.empty((B, T, HV), dtype=torch.float32, device=device)
    configuration = key_gradient_configuration(q, K, V)
    tiles = triton.cdiv(K, configuration["BK"])
    parts = [like.dtype if tiles == 1 else torch.float32 for like in (g, beta)]
    dg, dbeta = (make((tiles, B, T, HV), dtype=dtype, device=device) for dtype in parts)
    shape = {"scale": scale, "T": T, "HV": HV, "V": V, "C": CHUNK, "PRECISION": precision_of(q), **table.arguments()}
    shape |= strides_of("do", do)
    launch(value_gradient_kernel)[(table.chunks * HV,)](
        v=v, do=do, c_sum=x.c_sum, beta=x.beta, written=written, X=X, dP=dP, dA=dA, dv=dv, dbeta=dbeta_of_value,
        **strides_of("v", v), **value_gradient_configuration(q, V), **shape,
    )  # fmt: skip
    dc = torch.empty((tiles, B, T, HV), dtype=torch.float32, device=device)
    launch(key_gradient_kernel)[(table.chunks * H * tiles,)](
        q=q, k=k, do=do, beta=x.beta, from_start=x.from_start, to_end=x.to_end, written=written, X=X, dP=dP, dA=dA,
        states=states, dstates=dstates, dbeta_of_value=dbeta_of_value, dc=dc, dq=dq, dk=dk, dg=dg, dbeta=dbeta,
        stride_part=B * T * HV, **strides_of("q", q), **strides_of("k", k), H=H, K=K, **configuration, **shape,
    )  # fmt: skip
    dg, dbeta = (part[0] if tiles == 1 else part.sum(0).to(x.dtype) for part, x in ((dg, g), (dbeta, beta)))
    return dq, dk, dv, dg, dbeta


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        q, k, v, g, beta, state, cu_seqlens = ahead_of_time_inputs(*shape)
        call = (torch.empty_like(v), state, q, k, v, g, beta, state, cu_seqlens, 0.1)
        cases += cases_of_call(f"chunk_backward {name}", chunk_backward, *call)
    return cases
