"""The chunkwise gated delta rule on the GPU, backward. Nothing is saved by the forward but its inputs.

1. ``intra_chunk`` again, then the forward scan, this time writing the state ``S`` before each chunk and ``V'``.
2. **reverse_scan_kernel**, one program a (sequence, value head, tile of value columns), last chunk first, carries
   ``dS``, the gradient of the state after the chunk, and writes it and ``X``::

       dV' = P^T dO + exp(c_C - c) * (K dS)        X = inverse^T dV'
       dS <- exp(c_C) dS + (scale * exp(c) * Q)^T dO - K^T (beta * exp(c) * X)         (the last term is W^T dV')

3. **gradient_kernel**, one program a (chunk, value head). With ``X`` the rest is short::

       dV = beta * X                       Y = -X S^T
       dP = lower(dO V'^T)                 dA = -strict_lower(X V'^T)
       dbeta_i = X_i . V_i + exp(c_i) Y_i . K_i + sum_j (dA * D * K K^T)_ij
       dQ = scale * ((dP * D) K + exp(c) * (dO S^T))
       dK = scale * (dP * D)^T Q + (M + M^T) K + beta exp(c) * Y + exp(c_C - c) * (V' dS^T)      (M = beta * dA * D)

   ``dA = -inverse^T (dT) inverse^T`` needs no product with the inverse besides ``X``: U - W S is V', so
   ``X U^T + Y W^T = X (U - W S)^T = X V'^T``. The gate's gradient is the reverse cumulative sum of what each ``exp``
   received.

Gradients of grouped heads are written a value head each and added by torch: no atomics.
Source of the chunk form: arXiv 2412.06464, section 3.3; the derivation is checked against autograd in the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.chunk_forward import (
    AHEAD_OF_TIME,
    ahead_of_time_inputs,
    scan,
    scan_configuration,
    sequence_of,
)
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import (
    CHUNK,
    IntraChunk,
    chunk_of,
    intra_chunk,
    precision_of,
    rows_contiguous,
    shared_memory_of,
    warps,
)
from gdn_ops.kernels.triton.launch import launch


@triton.jit
def reverse_scan_kernel(
    q,
    k,
    beta,
    inverse,
    P,
    from_start,
    to_end,
    do,
    dfinal_state,
    dstates,
    X,
    dinitial_state,
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    hv = (program // NV % HV).to(tl.int64)
    n = (program // (NV * HV)).to(tl.int64)
    b, begin, end, first_chunk = sequence_of(n, T, cu_seqlens, chunk_offsets, C)
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
    token = begin + (chunks - 1).to(tl.int64) * C
    q += b * stride_q_b + token * stride_q_t + h * stride_q_h
    k += b * stride_k_b + token * stride_k_t + h * stride_k_h
    do += b * stride_do_b + token * stride_do_t + hv * stride_do_h
    here = (b * HV + hv) * T + token
    beta += b * stride_beta_b + token * stride_beta_t + hv * stride_beta_h
    inverse += here * C
    P += here * C
    from_start += here
    to_end += here
    X += here * V
    dstates += ((first_chunk + chunks - 1) * HV + hv) * K * V

    if dfinal_state is None:
        dS_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        dS_kv = tl.load(dfinal_state + (n * HV + hv) * K * V + state_offsets, mask=mask_kv, other=0.0).to(tl.float32)
    for i in range(0, chunks):
        left = tl.minimum(length - (chunks - 1 - i) * C, C)
        real = rows < left
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        do_cv = tl.load(do + rows[:, None].to(tl.int64) * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
        p_cc = tl.load(P + rows[:, None] * C + rows[None, :], mask=real[:, None], other=0.0)
        k_ck = tl.load(k + rows[:, None].to(tl.int64) * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
        inverse_cc = tl.load(inverse + rows[:, None] * C + rows[None, :], mask=real[:, None], other=0.0)
        q_ck = tl.load(q + rows[:, None].to(tl.int64) * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
        grown_c = tl.load(from_start + rows, mask=real, other=0.0)
        beta_c = tl.load(beta + rows.to(tl.int64) * stride_beta_t, mask=real, other=0.0).to(tl.float32)
        decay_c = tl.load(to_end + rows, mask=real, other=0.0)
        whole = tl.load(from_start + left - 1)
        dS_low = dS_kv.to(k_ck.dtype)
        tl.store(dstates + state_offsets, dS_low, mask=mask_kv)
        dnew_cv = tl.dot(k_ck, dS_low, input_precision=PRECISION) * decay_c[:, None]
        dnew_cv = tl.dot(tl.trans(p_cc), do_cv, dnew_cv, input_precision=PRECISION)
        x_cv = tl.dot(tl.trans(inverse_cc), dnew_cv.to(inverse_cc.dtype), input_precision=PRECISION)
        tl.store(X + rows[:, None] * V + in_v[None, :], x_cv.to(X.dtype.element_ty), mask=mask_cv)
        grown_cv = (do_cv.to(tl.float32) * (grown_c * scale)[:, None]).to(q_ck.dtype)
        dS_kv = tl.dot(tl.trans(q_ck), grown_cv, dS_kv * whole, input_precision=PRECISION)
        taken_cv = (x_cv * (-grown_c * beta_c)[:, None]).to(k_ck.dtype)
        dS_kv = tl.dot(tl.trans(k_ck), taken_cv, dS_kv, input_precision=PRECISION)
        q -= C * stride_q_t
        k -= C * stride_k_t
        do -= C * stride_do_t
        beta -= C * stride_beta_t
        inverse -= C * C
        P -= C * C
        from_start -= C
        to_end -= C
        X -= C * V
        dstates -= HV * K * V
    if dinitial_state is not None:
        tl.store(dinitial_state + (n * HV + hv) * K * V + state_offsets, dS_kv, mask=mask_kv)


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
    written,
    X,
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // HV
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    h = hv // (HV // H)
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    here = (b * HV + hv) * T + begin
    there = (b * T + begin) * HV + hv
    written += here * V
    X += here * V
    states += (chunk.to(tl.int64) * HV + hv) * K * V
    dstates += (chunk.to(tl.int64) * HV + hv) * K * V
    dq += there * K
    dk += there * K
    dv += there * V

    rows = tl.arange(0, C)
    rows_t = rows.to(tl.int64)
    real = rows < length
    c = tl.load(c_sum + here + rows, mask=real, other=0.0)
    grown_c = tl.load(from_start + here + rows, mask=real, other=0.0)
    decay_c = tl.load(to_end + here + rows, mask=real, other=0.0)
    whole = tl.load(from_start + here + length - 1)
    beta_c = tl.load(beta + rows * stride_beta_t, mask=real, other=0.0).to(tl.float32)
    low = q.dtype.element_ty

    dp_cc = tl.zeros([C, C], dtype=tl.float32)
    da_cc = tl.zeros([C, C], dtype=tl.float32)
    dbeta_c = tl.zeros([C], dtype=tl.float32)
    for start in range(0, V, BV):
        in_v = start + tl.arange(0, BV)
        mask = real[:, None] & (in_v < V)[None, :]
        x_cv = tl.load(X + rows[:, None] * V + in_v[None, :], mask=mask, other=0.0)
        new_cv = tl.load(written + rows[:, None] * V + in_v[None, :], mask=mask, other=0.0)
        do_cv = tl.load(do + rows_t[:, None] * stride_do_t + in_v[None, :], mask=mask, other=0.0)
        v_cv = tl.load(v + rows_t[:, None] * stride_v_t + in_v[None, :], mask=mask, other=0.0)
        x_wide = x_cv.to(tl.float32)
        dv_cv = x_wide * beta_c[:, None]
        tl.store(dv + rows_t[:, None] * (HV * V) + in_v[None, :], dv_cv.to(dv.dtype.element_ty), mask=mask)
        dbeta_c += tl.sum(x_wide * v_cv.to(tl.float32), axis=1)
        new_vc = tl.trans(new_cv)
        dp_cc = tl.dot(do_cv, new_vc, dp_cc, input_precision=PRECISION)
        da_cc = tl.dot(x_cv, new_vc, da_cc, input_precision=PRECISION)

    qk_cc = tl.zeros([C, C], dtype=tl.float32)
    kk_cc = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, K, BK):
        in_k = start + tl.arange(0, BK)
        mask = real[:, None] & (in_k < K)[None, :]
        q_ck = tl.load(q + rows_t[:, None] * stride_q_t + in_k[None, :], mask=mask, other=0.0)
        k_ck = tl.load(k + rows_t[:, None] * stride_k_t + in_k[None, :], mask=mask, other=0.0)
        k_kc = tl.trans(k_ck)
        qk_cc = tl.dot(q_ck, k_kc, qk_cc, input_precision=PRECISION)
        kk_cc = tl.dot(k_ck, k_kc, kk_cc, input_precision=PRECISION)

    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    strict = (rows[:, None] > rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    dp_cc = tl.where(lower, dp_cc * D, 0.0) * scale
    da_cc = tl.where(strict, -da_cc * D, 0.0)
    dkk = da_cc * kk_cc
    dbeta_c += tl.sum(dkk, axis=1)
    dlog = dp_cc * qk_cc + dkk * beta_c[:, None]
    dc = tl.sum(dlog, axis=1) - tl.sum(dlog, axis=0)
    da_cc = da_cc * beta_c[:, None]
    dqk_low = dp_cc.to(low)
    dkk_low = (da_cc + tl.trans(da_cc)).to(low)

    to_all = 0.0
    dend_c = tl.zeros([C], dtype=tl.float32)
    for start in range(0, K, BK):
        in_k = start + tl.arange(0, BK)
        mask_k = in_k < K
        mask = real[:, None] & mask_k[None, :]
        dq_ck = tl.zeros([C, BK], dtype=tl.float32)
        y_ck = tl.zeros([C, BK], dtype=tl.float32)
        dend_ck = tl.zeros([C, BK], dtype=tl.float32)
        for start_v in range(0, V, BV):
            in_v = start_v + tl.arange(0, BV)
            mask_v = in_v < V
            mask_cv = real[:, None] & mask_v[None, :]
            mask_vk = mask_v[:, None] & mask_k[None, :]
            x_cv = tl.load(X + rows[:, None] * V + in_v[None, :], mask=mask_cv, other=0.0)
            new_cv = tl.load(written + rows[:, None] * V + in_v[None, :], mask=mask_cv, other=0.0)
            do_cv = tl.load(do + rows_t[:, None] * stride_do_t + in_v[None, :], mask=mask_cv, other=0.0)
            s_vk = tl.load(states + in_k[None, :] * V + in_v[:, None], mask=mask_vk, other=0.0)
            ds_vk = tl.load(dstates + in_k[None, :] * V + in_v[:, None], mask=mask_vk, other=0.0)
            dq_ck = tl.dot(do_cv, s_vk, dq_ck, input_precision=PRECISION)
            y_ck = tl.dot(x_cv, s_vk, y_ck, input_precision=PRECISION)
            dend_ck = tl.dot(new_cv, ds_vk, dend_ck, input_precision=PRECISION)
            to_all += tl.sum(tl.sum(s_vk.to(tl.float32) * ds_vk.to(tl.float32), axis=1), axis=0)
        q_ck = tl.load(q + rows_t[:, None] * stride_q_t + in_k[None, :], mask=mask, other=0.0)
        k_ck = tl.load(k + rows_t[:, None] * stride_k_t + in_k[None, :], mask=mask, other=0.0)
        q_wide = q_ck.to(tl.float32)
        k_wide = k_ck.to(tl.float32)
        dq_ck = dq_ck * (grown_c * scale)[:, None]
        y_ck = -y_ck * grown_c[:, None]
        dend_ck = dend_ck * decay_c[:, None]
        stored = tl.sum(y_ck * k_wide, axis=1)
        dbeta_c += stored
        ended = tl.sum(dend_ck * k_wide, axis=1)
        dend_c += ended
        dc += stored * beta_c + tl.sum(dq_ck * q_wide, axis=1) - ended
        dq_ck = tl.dot(dqk_low, k_ck, dq_ck, input_precision=PRECISION)
        dk_ck = y_ck * beta_c[:, None] + dend_ck
        dk_ck = tl.dot(tl.trans(dqk_low), q_ck, dk_ck, input_precision=PRECISION)
        dk_ck = tl.dot(dkk_low, k_ck, dk_ck, input_precision=PRECISION)
        tl.store(dq + rows_t[:, None] * (HV * K) + in_k[None, :], dq_ck.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + rows_t[:, None] * (HV * K) + in_k[None, :], dk_ck.to(dk.dtype.element_ty), mask=mask)

    # Every gate of the chunk reaches the state after it.
    to_all = to_all * whole + tl.sum(dend_c, axis=0)
    dc = tl.where(real, dc, 0.0)
    after = tl.sum(tl.where(rows[:, None] >= rows[None, :], dc[:, None], 0.0), axis=0)
    tl.store(dg + there + rows_t * HV, (after + to_all).to(dg.dtype.element_ty), mask=real)
    tl.store(dbeta + there + rows_t * HV, dbeta_c.to(dbeta.dtype.element_ty), mask=real)


def reverse_scan(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, beta: Tensor, scale: float,
    dfinal_state: Tensor | None, dstates: Tensor, X: Tensor, dinitial_state: Tensor | None,
) -> None:  # fmt: skip
    T, H, K = q.shape[1:]
    HV, V = do.shape[2:]
    configuration = scan_configuration(q, T, K, V, x.sequences * HV if isinstance(x.sequences, int) else None)
    launch(reverse_scan_kernel)[(x.sequences * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, beta=beta, inverse=x.inverse, P=x.P, from_start=x.from_start, to_end=x.to_end, do=do,
        dfinal_state=dfinal_state, dstates=dstates, X=X, dinitial_state=dinitial_state, cu_seqlens=x.cu_seqlens,
        chunk_offsets=x.chunk_offsets, scale=scale, T=T, N=x.sequences,
        stride_q_b=q.stride(0), stride_q_t=q.stride(1), stride_q_h=q.stride(2),
        stride_k_b=k.stride(0), stride_k_t=k.stride(1), stride_k_h=k.stride(2),
        stride_do_b=do.stride(0), stride_do_t=do.stride(1), stride_do_h=do.stride(2),
        stride_beta_b=beta.stride(0), stride_beta_t=beta.stride(1), stride_beta_h=beta.stride(2),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def gradient_configuration(x: Tensor, T: int, K: int, V: int) -> dict[str, int]:
    """Tiles of the per-chunk kernel: 64 x 64, smaller where fp32 operands or a small chip leave no room."""
    width = 64 if x.element_size() == 2 else 32
    if shared_memory_of(x) < 120_000:
        width //= 2
    BK = max(16, min(width, triton.next_power_of_2(K)))
    BV = max(16, min(width, triton.next_power_of_2(V)))
    return {"BK": BK, "BV": BV, "num_warps": 8 if x.element_size() == 4 else warps(x, T, K, V), "num_stages": 2}


def chunk_backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, g, beta in their own dtypes, and of initial_state in fp32 (no rows without one)."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = q.device
    dinitial_state = torch.empty((0 if initial_state is None else N, HV, K, V), dtype=torch.float32, device=device)
    # Tokens after the last packed sequence belong to none: their gradients are zeros.
    make = torch.empty if cu_seqlens is None else torch.zeros
    dv, dg, dbeta = (make(x.shape, dtype=x.dtype, device=device) for x in (v, g, beta))
    dq, dk = (make((B, T, HV, K), dtype=q.dtype, device=device) for _ in range(2))
    if N == 0 or T == 0:
        if initial_state is not None:
            dinitial_state.zero_() if dfinal_state is None else dinitial_state.copy_(dfinal_state)
        dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k))
        return dq, dk, dv.zero_(), dg.zero_(), dbeta.zero_(), dinitial_state
    q, k, v, do = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), rows_contiguous(do)
    initial_state = None if initial_state is None else initial_state.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    x = intra_chunk(q, k, v, g, beta, cu_seqlens, scale)
    states = torch.empty((x.chunks, HV, K, V), dtype=q.dtype, device=device)
    written = torch.empty_like(x.U)
    scan(x, q, k, v, scale, initial_state=initial_state, states=states, written=written)
    dstates, X = torch.empty_like(states), x.U
    reverse_scan(x, do, q, k, beta, scale, dfinal_state, dstates, X, None if initial_state is None else dinitial_state)
    launch(gradient_kernel)[(x.chunks * HV,)](
        q=q, k=k, v=v, do=do, beta=beta, c_sum=x.c_sum, from_start=x.from_start, to_end=x.to_end,
        written=written, X=X, states=states, dstates=dstates, dq=dq, dk=dk, dv=dv, dg=dg, dbeta=dbeta,
        cu_seqlens=x.cu_seqlens, chunk_offsets=x.chunk_offsets, scale=scale, T=T, N=x.sequences,
        stride_q_b=q.stride(0), stride_q_t=q.stride(1), stride_q_h=q.stride(2),
        stride_k_b=k.stride(0), stride_k_t=k.stride(1), stride_k_h=k.stride(2),
        stride_v_b=v.stride(0), stride_v_t=v.stride(1), stride_v_h=v.stride(2),
        stride_do_b=do.stride(0), stride_do_t=do.stride(1), stride_do_h=do.stride(2),
        stride_beta_b=beta.stride(0), stride_beta_t=beta.stride(1), stride_beta_h=beta.stride(2),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **gradient_configuration(q, T, K, V),
    )  # fmt: skip
    if HV != H:
        dq, dk = (d.unflatten(2, (H, HV // H)).sum(3) for d in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial_state


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        q, k, v, g, beta, state, cu_seqlens = ahead_of_time_inputs(*shape)
        call = (torch.empty_like(v), state, q, k, v, g, beta, state, cu_seqlens, 0.1)
        cases += cases_of_call(f"chunk_backward {name}", chunk_backward, *call)
    return cases
