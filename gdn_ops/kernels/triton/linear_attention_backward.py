"""Chunkwise gated linear attention on the GPU, backward. Nothing is saved by the forward but its inputs.

1. ``decay_kernel`` and ``score_kernel`` again, and, where sequences are cut, the maps of their segments, both ways.
2. **linear_both_ways_kernel**: every other program scans forward and writes the state ``S`` before each chunk; the
   others scan back, write dv and ``dS``, the gradient of the state after each chunk. Neither needs the other.
3. **score_gradient_kernel**, one program a (chunk, value head): ``dP = scale * (dO V^T) * D``, where ``P`` was.
4. **linear_gradient_kernel**, one program a (chunk, key head, part of its value heads, tile of key columns), adds over
   the value heads of its part::

       dQ = scale * exp(c) * (dO S^T) + dP K          dK = exp(c_C - c) * (V dS^T) + dP^T Q

   Every exp(c_i) stands with row i of Q, every exp(-c_j) with row j of K, so the gradient of c is ``Q . dQ - K . dK``,
   row by row. What cancels in it was made of the same rounded ``dP``, and is summed before it is rounded.
5. **gate_gradient_kernel**, one program a (chunk, block of heads): a reverse cumulative sum turns the gradient of c
   into that of g, and what comes through the state after the chunk is added. It is a kernel of its own because the one
   before would wait at barriers for sums across rows.

Mamba2 has one key head for all value heads: torch adds the parts of dq and dk in a fixed order. No atomics. The tests
check the derivation against autograd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_forward import aligned, aligned_state, is_narrow, two_tokens
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of, chunk_table
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import members, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.linear_attention import (
    AHEAD_OF_TIME,
    Decays,
    ahead_of_time_inputs,
    decays,
    empty_maps,
    linear_combine,
    linear_scan_configuration,
    linear_segment_length,
    scan_either_way,
    scores,
)


@triton.jit
def linear_both_ways_kernel(
    q,
    k,
    v,
    do,
    P,
    from_start,
    to_end,
    dv,
    before,
    after,
    leave,
    leave_back,
    states,
    dstates,
    decay,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t: tl.constexpr,
    stride_q_h,
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
    """The scan without outputs, and the scan back, in turns; what is None is not written (``scan_either_way``)."""
    program = tl.program_id(0)
    if program % 2 == 0:
        scan_either_way(
            program // 2, q, k, v, P, from_start, to_end, None, before, leave, states, decay, cu_seqlens,
            chunk_offsets, segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b,
            stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h, H, HV, K, V, BK, BV, C, PRECISION, False,
        )  # fmt: skip
    else:
        scan_either_way(
            program // 2, k, q, do, P, from_start, to_end, dv, after, leave_back, dstates, decay, cu_seqlens,
            chunk_offsets, segment_offsets, SEGMENT, scale, T, N, stride_k_b, stride_k_t, stride_k_h, stride_q_b,
            stride_q_t, stride_q_h, stride_do_b, stride_do_t, stride_do_h, H, HV, K, V, BK, BV, C, PRECISION, True,
        )  # fmt: skip


@triton.jit
def score_gradient_kernel(
    v,
    do,
    c_sum,
    dP,
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
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of((program // HV).to(tl.int64), T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    rows = tl.arange(0, C)
    real = rows < length
    here = program.to(tl.int64) * C
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h
    dp_cc = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, V, BV):
        in_v = start + tl.arange(0, BV)
        mask_cv = real[:, None] & (in_v < V)[None, :]
        do_cv = tl.load(do + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        v_cv = tl.load(v + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
        dp_cc = tl.dot(do_cv, tl.trans(v_cv), dp_cc, input_precision=PRECISION)
    c = tl.load(c_sum + here + rows)
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    dp_cc = tl.where(lower, dp_cc * D * scale, 0.0).to(dP.dtype.element_ty)
    tl.store(dP + here * C + rows[:, None] * C + rows[None, :], dp_cc)


@triton.jit
def linear_gradient_kernel(
    q,
    k,
    v,
    do,
    from_start,
    to_end,
    dP,
    states,
    dstates,
    dq,
    dk,
    dc,
    ended,
    to_all,
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
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
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
    MEMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dq, dk [parts, B, T, H, K]``, ``stride_part`` apart. ``dc``, ``ended = K . dK`` of what is left at the end of
    the chunk, and ``to_all = S . dS`` are sums over the program's tile of keys, ``[chunks, HV, tiles, C or BV]``."""
    NK: tl.constexpr = (K + BK - 1) // BK
    GROUP: tl.constexpr = HV // H
    PARTS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    program = tl.program_id(0)
    tile = program % NK
    part = (program // NK % PARTS).to(tl.int64)
    h = (program // (NK * PARTS) % H).to(tl.int64)
    chunk = (program // (NK * PARTS * H)).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
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
    diagonal = tl.arange(0, BV)[:, None] == tl.arange(0, BV)[None, :]
    dq_ck = tl.zeros([C, BK], dtype=tl.float32)
    dk_ck = tl.zeros([C, BK], dtype=tl.float32)
    for member in range(part * MEMBERS, tl.minimum(part * MEMBERS + MEMBERS, GROUP)):
        hv = h * GROUP + member
        here = (chunk * HV + hv) * C
        states_at = states + (chunk * HV + hv) * K * V
        dstates_at = dstates + (chunk * HV + hv) * K * V
        v_at = v + b * stride_v_b + begin * stride_v_t + hv * stride_v_h
        do_at = do + b * stride_do_b + begin * stride_do_t + hv * stride_do_h
        # Of this member; what multiplies a row is applied when the sum over the values is there.
        toward_q = tl.zeros([C, BK], dtype=tl.float32)
        toward_k = tl.zeros([C, BK], dtype=tl.float32)
        # S . dS is the trace of a product: what a product reads must not be read otherwise (docs/kernels.md, Traps).
        to_all_vv = tl.zeros([BV, BV], dtype=tl.float32)
        for start in range(0, V, BV):
            in_v = start + tl.arange(0, BV)
            mask_v = in_v < V
            mask_cv = real[:, None] & mask_v[None, :]
            mask_vk = mask_v[:, None] & mask_k[None, :]
            offsets_vk = in_v[:, None] * K + in_k[None, :]
            do_cv = tl.load(do_at + rows[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
            v_cv = tl.load(v_at + rows[:, None] * stride_v_t + in_v[None, :], mask=mask_cv, other=0.0)
            s_vk = tl.load(states_at + offsets_vk, mask=mask_vk, other=0.0)
            ds_vk = tl.load(dstates_at + offsets_vk, mask=mask_vk, other=0.0)
            toward_q = tl.dot(do_cv, s_vk, toward_q, input_precision=PRECISION)
            toward_k = tl.dot(v_cv, ds_vk, toward_k, input_precision=PRECISION)
            to_all_vv = tl.dot(s_vk, tl.trans(ds_vk), to_all_vv, input_precision=PRECISION)
        to_all_v = tl.sum(tl.where(diagonal, to_all_vv, 0.0), axis=1)
        dp_cc = tl.load(dP + here * C + square)
        toward_q *= (tl.load(from_start + here + rows) * scale)[:, None]
        toward_q = tl.dot(dp_cc, k_ck, toward_q, input_precision=PRECISION)
        dq_ck += toward_q
        dc_c = tl.sum(toward_q * q_ck.to(tl.float32), axis=1)
        toward_k *= tl.load(to_end + here + rows)[:, None]
        ended_c = tl.sum(toward_k * k_ck.to(tl.float32), axis=1)
        toward_k = tl.dot(tl.trans(dp_cc), q_ck, toward_k, input_precision=PRECISION)
        dk_ck += toward_k
        dc_c -= tl.sum(toward_k * k_ck.to(tl.float32), axis=1)
        at = (chunk * HV + hv) * NK + tile
        tl.store(dc + at * C + rows, dc_c)
        tl.store(ended + at * C + rows, ended_c)
        tl.store(to_all + at * BV + tl.arange(0, BV), to_all_v)
    there = part * stride_part + ((b * T + begin) * H + h) * K
    out = there + rows[:, None] * (H * K) + in_k[None, :]
    tl.store(dq + out, dq_ck.to(dq.dtype.element_ty), mask=mask_ck)
    tl.store(dk + out, dk_ck.to(dk.dtype.element_ty), mask=mask_ck)


@triton.jit
def gate_gradient_kernel(
    dc,
    ended,
    to_all,
    from_start,
    dg,
    cu_seqlens,
    chunk_offsets,
    T,
    N,
    HV: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (HV + BH - 1) // BH
    program = tl.program_id(0)
    chunk = (program // BLOCKS).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    rows = tl.arange(0, C)
    in_v = tl.arange(0, BV)
    heads = (program % BLOCKS * BH + tl.arange(0, BH)).to(tl.int64)
    mask_h = heads < HV
    here = chunk * HV + heads
    dc_hc = tl.zeros([BH, C], dtype=tl.float32)
    ended_hc = tl.zeros([BH, C], dtype=tl.float32)
    to_all_hv = tl.zeros([BH, BV], dtype=tl.float32)
    for tile in range(0, NK):
        at = (here * NK + tile)[:, None]
        dc_hc += tl.load(dc + at * C + rows[None, :], mask=mask_h[:, None], other=0.0)
        ended_hc += tl.load(ended + at * C + rows[None, :], mask=mask_h[:, None], other=0.0)
        to_all_hv += tl.load(to_all + at * BV + in_v[None, :], mask=mask_h[:, None], other=0.0)
    whole_h = tl.load(from_start + here * C + C - 1, mask=mask_h, other=0.0)
    # Every gate of the chunk reaches the state after it.
    through_h = tl.sum(ended_hc, axis=1) + tl.sum(to_all_hv, axis=1) * whole_h
    dg_hc = tl.cumsum(dc_hc, axis=1, reverse=True) + through_h[:, None]
    out = dg + (b * T + begin + rows)[None, :] * HV + heads[:, None]
    tl.store(out, dg_hc.to(dg.dtype.element_ty), mask=mask_h[:, None] & (rows < length)[None, :])


def scan_both_ways(
    x: Decays, P: Tensor | None, do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    before: Tensor | None, after: Tensor | None, leave_back: Tensor | None, dv: Tensor | None = None,
    states: Tensor | None = None, dstates: Tensor | None = None, leave: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches :func:`linear_both_ways_kernel`; ``before`` and ``after`` are those of each segment."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    configuration = linear_scan_configuration(q, K, V, table.heads(HV, ways=2))
    launch(linear_both_ways_kernel)[(2 * table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, v=v, do=do, P=P, from_start=x.from_start, to_end=x.to_end, dv=dv, before=before, after=after,
        leave=leave, leave_back=leave_back, states=states, dstates=dstates, decay=decay, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
        **strides_of("do", do), H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def score_gradient_configuration(x: Tensor, V: int) -> dict[str, int]:
    """One accumulator ``[C, C]``; not measured yet."""
    widest, warps = (64, 4) if x.element_size() == 2 else (32, 8)
    return {"BV": max(16, min(widest, triton.next_power_of_2(V))), "num_warps": warps, "num_stages": 2}


def linear_gradient_configuration(x: Tensor, K: int, V: int, group: int) -> dict[str, int]:
    """Four accumulators ``[C, BK]`` and one ``[BV, BV]``: the tiles that ``chunk_backward.key_gradient_kernel``
    had when it took one pass; not measured yet. What spills on Hopper (.3 KB a thread) are q and k in fp32, which the
    row sums need.

    Sixteen value heads of a ``group`` at most: parts of dq and dk weigh an eighth of their states then, and 2048 tokens
    of 64 heads still fill a chip. The order of a sum depends on nothing but the number of heads.
    """
    wide = 64 if chip_of(x).large else 32
    BK, BV, warps = (64, wide, 4) if x.element_size() == 2 else (32, 32, 8)
    BK, BV = (max(16, min(widest, triton.next_power_of_2(width))) for widest, width in ((BK, K), (BV, V)))
    return {"BK": BK, "BV": BV, "MEMBERS": members(group, 16), "num_warps": warps, "num_stages": 2}


def chunk_backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g in their own dtypes, and of initial_state in fp32 (no rows without one)."""
    T = q.shape[1]
    rest = (initial_state, cu_seqlens, scale)
    if is_narrow(q, v):
        wide = [x.to(torch.float32) for x in (do, q, k, v)]
        dq, dk, dv, *others = chunk_backward(wide[0], dfinal_state, *wide[1:], g, *rest)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *others
    if isinstance(T, int) and T == 1:
        *grads, dS = chunk_backward(two_tokens(do), dfinal_state, *map(two_tokens, (q, k, v, g)), *rest)
        return (*(x[:, :1].contiguous() for x in grads), dS)
    K, V = q.shape[3], v.shape[3]
    q, k, v, do = aligned(q), aligned(k), aligned(v), aligned(do)
    states = (aligned_state(x, q, v) for x in (dfinal_state, initial_state))
    dq, dk, dv, dg, dS = _backward(do, *states, q, k, v, g, cu_seqlens, scale)
    dq, dk, dv = (x[..., :size].contiguous() for x, size in ((dq, K), (dk, K), (dv, V)))
    return dq, dk, dv, dg, dS[:, :, :K, :V].contiguous()


def _backward(do, dfinal_state, initial_state, q, k, v, g, cu_seqlens, scale) -> tuple[Tensor, ...]:
    """The same for aligned inputs of at least two tokens."""
    (B, T, H, K), (HV, V), device = q.shape, v.shape[2:], q.device
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dS = torch.empty((0 if initial_state is None else N, HV, K, V), dtype=torch.float32, device=device)
    if N == 0 or (isinstance(T, int) and T == 0):
        if initial_state is not None:
            dS.zero_() if dfinal_state is None else dS.copy_(dfinal_state)
        return *(torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k, v, g)), dS
    # Tokens after the last packed sequence belong to none: their gradients are zeros.
    make = torch.empty if cu_seqlens is None else torch.zeros
    configuration = linear_gradient_configuration(q, K, V, HV // H)
    tiles, parts = triton.cdiv(K, configuration["BK"]), triton.cdiv(HV // H, configuration["MEMBERS"])
    dq, dk = (make((parts, *q.shape), dtype=q.dtype if parts == 1 else torch.float32, device=device) for _ in range(2))
    dv = make(v.shape, dtype=v.dtype, device=device)
    dg = make((B, T, HV), dtype=g.dtype, device=device)
    table = chunk_table(B, T, cu_seqlens, linear_segment_length(q, v, cu_seqlens, ways=2))
    x, leave = decays(g, table), None if initial_state is None else dS
    before, after = initial_state, dfinal_state
    if table.segment is not None:
        forth = empty_maps(q, v, table)
        back = forth._replace(B=torch.empty_like(forth.B))  # a segment scales both ways by the same number
        scan_both_ways(
            x, None, do, q, k, v, scale, table, before=None, after=None, leave=forth.B, leave_back=back.B,
            decay=forth.decay,
        )  # fmt: skip
        before = linear_combine(forth, initial_state, None, T, table, reverse=False)
        after = linear_combine(back, dfinal_state, leave, T, table, reverse=True)
    states = torch.empty((table.chunks, HV, V, K), dtype=q.dtype, device=device)
    dstates, P = torch.empty_like(states), scores(x, q, k, table, scale)
    scan_both_ways(
        x, P, do, q, k, v, scale, table, before=before, after=after, leave_back=leave, dv=dv, states=states,
        dstates=dstates,
    )  # fmt: skip
    shape = {"scale": scale, "T": T, "HV": HV, "V": V, "C": CHUNK, "PRECISION": precision_of(q), **table.arguments()}
    shape |= {**strides_of("v", v), **strides_of("do", do)}
    # P has been used: its memory takes dP.
    launch(score_gradient_kernel)[(table.chunks * HV,)](
        v=v, do=do, c_sum=x.c_sum, dP=P, **score_gradient_configuration(q, V), **shape
    )
    dc, ended, to_all = (
        torch.empty((table.chunks, HV, tiles, width), dtype=torch.float32, device=device)
        for width in (CHUNK, CHUNK, configuration["BV"])
    )
    launch(linear_gradient_kernel)[(table.chunks * H * parts * tiles,)](
        q=q, k=k, v=v, do=do, from_start=x.from_start, to_end=x.to_end, dP=P, states=states, dstates=dstates, dq=dq,
        dk=dk, dc=dc, ended=ended, to_all=to_all, stride_part=B * T * H * K, **strides_of("q", q),
        **strides_of("k", k), H=H, K=K, **configuration, **shape,
    )  # fmt: skip
    BH = min(8, triton.next_power_of_2(HV))
    launch(gate_gradient_kernel)[(table.chunks * triton.cdiv(HV, BH),)](
        dc=dc, ended=ended, to_all=to_all, from_start=x.from_start, dg=dg, T=T, **table.arguments(), HV=HV, NK=tiles,
        BV=configuration["BV"], BH=BH, C=CHUNK, num_warps=4,
    )  # fmt: skip
    dq, dk = (part[0] if parts == 1 else part.sum(0).to(q.dtype) for part in (dq, dk))
    return dq, dk, dv, dg, dS


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        q, k, v, g, state, cu_seqlens = ahead_of_time_inputs(*shape)
        call = (torch.empty_like(v), state, q, k, v, g, state, cu_seqlens, 0.1)
        cases += cases_of_call(f"linear_attention_backward {name}", chunk_backward, *call)
    return cases
