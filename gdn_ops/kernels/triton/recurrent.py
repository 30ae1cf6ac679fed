"""The gated delta rule, and gated linear attention, token by token on the GPU: decode, and short sequences.

One program owns one (sequence, value head, tile of ``BV`` value columns). The columns of the state never meet in the
recurrence, so the program keeps its ``[K, BV]`` tile in fp32 registers from the first token to the last: the state is
read once and written once, which for a single token is all the traffic there is (decode is bound by memory). A pool
takes the state after each token as well, where slots are named for them: the tile goes on in fp32, whatever the pool's
dtype.

Both reductions of a token, ``S^T k`` and ``S^T q``, read the state *before* the token, so they run side by side::

    u   = beta * (v - exp(g) * (S^T k))
    o   = scale * (exp(g) * (S^T q) + (k . q) * u)          (= scale * S_new^T q)
    S  <- exp(g) * S + k u^T

Without ``beta`` it is gated linear attention: ``u = v``, and ``S^T k`` is not needed.

The next token's operands are loaded while the present one is worked on. Nothing about a sequence's arithmetic depends
on its neighbours: the same sequence gives the same bits in any batch.

A pool of 16 bits a number has twice the numbers a byte, and at one token the sums over ``K``, not memory, would decide.
There tensor cores make both reads, ``[k; q] S`` (:func:`_run_one_token`): the numbers as they lie in memory, exact
products, sums in fp32.

Tiles: a row of a tile is two 128-byte lines (64 fp32 columns; one line costs a tenth of the copy's rate, half a line a
third), a thread holds 64 numbers of the state, 128 of 16 bits, so a block keeps 32 KB in flight with 16-byte accesses,
along ``V`` or along ``K``, whichever the state's strides make contiguous. ``K`` and ``V`` need not be powers of two:
the tile is padded with zeros, and the padding is never read or written.

Offsets are 64-bit. States may have any strides and, in the pool, any floating dtype; the arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.launch import launch


@triton.jit
def _bounds(n, T, cu_seqlens):
    """Row of the batch, first token and end of sequence ``n``, clamped so that bad bounds never leave the tensor."""
    if cu_seqlens is None:
        b = n
        begin = n * 0
        end = begin + T
    else:
        b = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), begin), T)
    return b, begin, end


@triton.jit
def _inside(offsets, n: tl.constexpr, tile: tl.constexpr):
    """The mask of ``offsets`` below ``n``; where tiles divide ``n``, a constant that the compiler drops."""
    if n % tile == 0:
        return tl.full(offsets.shape, True, tl.int1)
    else:
        return offsets < n


@triton.jit
def _state_offsets(offsets_k, offsets_v, stride_k, stride_v, V: tl.constexpr, DENSE: tl.constexpr):
    """Offsets in a head's state. ``DENSE``, rows one after another: without 64-bit addresses of rows in registers."""
    if DENSE:
        return offsets_k[:, None] * V + offsets_v[None, :]
    else:
        return offsets_k.to(tl.int64)[:, None] * stride_k + offsets_v.to(tl.int64)[None, :] * stride_v


@triton.jit
def _write_zeros(o, stride_o_t, begin, end, offsets_v, mask_v):
    zeros = tl.zeros(offsets_v.shape, dtype=o.dtype.element_ty)
    for t in range(begin, end):
        tl.store(o + t * stride_o_t + offsets_v, zeros, mask=mask_v)


@triton.jit
def _run_tokens(
    S_kv,
    q,
    k,
    v,
    g,
    beta,
    o,
    scale,
    begin,
    end,
    stride_q_t,
    stride_k_t,
    stride_v_t,
    stride_g_t,
    stride_beta_t,
    stride_o_t,
    offsets_q,
    offsets_k,
    offsets_v,
    offsets_o,
    mask_k,
    mask_v,
    slots=None,
    states=None,
    P=None,
    stride_states_p=None,
    offsets_s=None,
    mask_kv=None,
):
    """Run tokens ``begin .. end`` through the state; pointers stand at token 0 of this sequence's row and head.

    ``beta`` None: all of v is written. With ``slots``, the slot of each token in a pool of ``P`` states, the state
    after the token is left there; ``states`` stands at this head of slot 0.
    """
    q += begin * stride_q_t
    k += begin * stride_k_t
    v += begin * stride_v_t
    g += begin * stride_g_t
    if beta is not None:
        beta += begin * stride_beta_t
    o += begin * stride_o_t
    some = begin < end
    q_k = tl.load(q + offsets_q, mask=mask_k & some, other=0.0)
    k_k = tl.load(k + offsets_k, mask=mask_k & some, other=0.0)
    v_v = tl.load(v + offsets_v, mask=mask_v & some, other=0.0)
    g_t = tl.load(g, mask=some, other=0.0)
    if beta is not None:
        beta_t = tl.load(beta, mask=some, other=0.0)
    for t in range(begin, end):
        more = t + 1 < end
        q += stride_q_t
        k += stride_k_t
        v += stride_v_t
        g += stride_g_t
        q_next = tl.load(q + offsets_q, mask=mask_k & more, other=0.0)
        k_next = tl.load(k + offsets_k, mask=mask_k & more, other=0.0)
        v_next = tl.load(v + offsets_v, mask=mask_v & more, other=0.0)
        g_next = tl.load(g, mask=more, other=0.0)
        if beta is not None:
            beta += stride_beta_t
            beta_next = tl.load(beta, mask=more, other=0.0)
        if slots is not None:
            slot = tl.load(slots + t).to(tl.int64)

        query_k = q_k.to(tl.float32)
        key_k = k_k.to(tl.float32)
        decay = tl.exp(g_t.to(tl.float32))
        read_v = tl.sum(S_kv * query_k[:, None], axis=0)
        overlap = tl.sum(key_k * query_k, axis=0)
        written_v = v_v.to(tl.float32)
        if beta is not None:
            stored_v = tl.sum(S_kv * key_k[:, None], axis=0)
            written_v = beta_t.to(tl.float32) * (written_v - decay * stored_v)
            beta_t = beta_next
        o_v = tl.cast(scale, tl.float32) * (decay * read_v + overlap * written_v)  # Inductor passes fp64
        S_kv = decay * S_kv + key_k[:, None] * written_v[None, :]
        tl.store(o + offsets_o, o_v.to(o.dtype.element_ty), mask=mask_v)
        if slots is not None:
            if (slot >= 0) & (slot < P):
                tl.store(states + slot * stride_states_p + offsets_s, S_kv.to(states.dtype.element_ty), mask=mask_kv)

        o += stride_o_t
        q_k = q_next
        k_k = k_next
        v_v = v_next
        g_t = g_next
    return S_kv


@triton.jit
def _run_one_token(S_kv, q, k, v, g, beta, o, scale, offsets_q, offsets_k, offsets_v, offsets_o, mask_k, mask_v):
    """:func:`_run_tokens` for one token and a state of q's and k's 16 bits, ``S_kv`` as it lies in memory."""
    q_k = tl.load(q + offsets_q, mask=mask_k, other=0.0)
    k_k = tl.load(k + offsets_k, mask=mask_k, other=0.0)
    v_v = tl.load(v + offsets_v, mask=mask_v, other=0.0)
    decay = tl.exp(tl.load(g).to(tl.float32))
    beta_t = tl.load(beta).to(tl.float32)
    key_k = k_k.to(tl.float32)
    row = tl.arange(0, 16)[:, None]  # the least that tensor cores take; two of them count
    reads = tl.dot(
        tl.where(row == 0, k_k[None, :], tl.where(row == 1, q_k[None, :], tl.zeros_like(k_k)[None, :])), S_kv
    )
    stored_v = tl.sum(tl.where(row == 0, reads, 0.0), axis=0)
    read_v = tl.sum(tl.where(row == 1, reads, 0.0), axis=0)
    overlap = tl.sum(key_k * q_k.to(tl.float32), axis=0)  # here, so that the state's loads start before any wait
    written_v = beta_t * (v_v.to(tl.float32) - decay * stored_v)
    o_v = tl.cast(scale, tl.float32) * (decay * read_v + overlap * written_v)
    tl.store(o + offsets_o, o_v.to(o.dtype.element_ty), mask=mask_v)
    # As a fused multiply-add, or ptxas may take a fourth more registers, and a block of three goes.
    return tl.fma(S_kv.to(tl.float32), decay, key_k[:, None] * written_v[None, :])


@triton.jit
def recurrent_forward_kernel(
    q,
    k,
    v,
    g,
    beta,
    o,
    initial_state,
    final_state,
    cu_seqlens,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_v_v,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_initial_n,
    stride_initial_h,
    stride_initial_k,
    stride_initial_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DENSE: tl.constexpr,
):
    """``beta`` None: gated linear attention; ``initial_state`` None: zeros; ``final_state`` None: not written;
    ``cu_seqlens`` None: one sequence a row."""
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // NV % HV
    n = (program // (NV * HV)).to(tl.int64)
    b, begin, end = _bounds(n, T, cu_seqlens)
    hv = head.to(tl.int64)
    h = (head // (HV // H)).to(tl.int64)
    offsets_k = tl.arange(0, BK)
    offsets_v = program % NV * BV + tl.arange(0, BV)
    mask_k = _inside(offsets_k, K, BK)
    mask_v = _inside(offsets_v, V, BV)
    mask_kv = mask_k[:, None] & mask_v[None, :]

    if initial_state is None:
        S_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        initial_state += n * stride_initial_n + hv * stride_initial_h
        offsets_s = _state_offsets(offsets_k, offsets_v, stride_initial_k, stride_initial_v, V, DENSE)
        S_kv = tl.load(initial_state + offsets_s, mask=mask_kv, other=0.0).to(tl.float32)
    o += (b * T * HV + hv) * V
    if beta is not None:
        beta += b * stride_beta_b + hv * stride_beta_h
    S_kv = _run_tokens(
        S_kv,
        q + b * stride_q_b + h * stride_q_h,
        k + b * stride_k_b + h * stride_k_h,
        v + b * stride_v_b + hv * stride_v_h,
        g + b * stride_g_b + hv * stride_g_h,
        beta,
        o,
        scale,
        begin,
        end,
        stride_q_t,
        stride_k_t,
        stride_v_t,
        stride_g_t,
        stride_beta_t,
        HV * V,
        offsets_k.to(tl.int64) * stride_q_k,
        offsets_k.to(tl.int64) * stride_k_k,
        offsets_v.to(tl.int64) * stride_v_v,
        offsets_v,
        mask_k,
        mask_v,
    )
    if cu_seqlens is not None:
        if n == N - 1:
            _write_zeros(o, HV * V, end, T, offsets_v, mask_v)
    if final_state is not None:
        final_state += (n * HV + hv) * (K * V)
        tl.store(final_state + offsets_k[:, None] * V + offsets_v[None, :], S_kv, mask=mask_kv)


@triton.jit
def recurrent_update_kernel(
    q,
    k,
    v,
    g,
    beta,
    o,
    state,
    state_indices,
    token_state_indices,
    cu_seqlens,
    scale,
    T,
    N,
    P,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_v_v,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_state_p,
    stride_state_h,
    stride_state_k,
    stride_state_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DENSE: tl.constexpr,
    ON_TENSOR_CORES: tl.constexpr,
):
    """The same on slot ``state_indices[n]`` of a pool of ``P`` states; a slot outside the pool gives zero outputs.

    With ``token_state_indices [B, T]`` the slots of the tokens are written instead. ``ON_TENSOR_CORES``: one token a
    sequence, neither ``cu_seqlens`` nor ``token_state_indices``, and a state of q's and k's 16 bits.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // NV % HV
    n = (program // (NV * HV)).to(tl.int64)
    b, begin, end = _bounds(n, T, cu_seqlens)
    hv = head.to(tl.int64)
    h = (head // (HV // H)).to(tl.int64)
    offsets_k = tl.arange(0, BK)
    offsets_v = program % NV * BV + tl.arange(0, BV)
    mask_k = _inside(offsets_k, K, BK)
    mask_v = _inside(offsets_v, V, BV)
    mask_kv = mask_k[:, None] & mask_v[None, :]

    if state_indices is None:
        slot = n
    else:
        slot = tl.load(state_indices + n).to(tl.int64)
    o += (b * T * HV + hv) * V
    if token_state_indices is not None:
        token_state_indices += b * T
    if (slot >= 0) & (slot < P):
        states = state + hv * stride_state_h
        state += slot * stride_state_p + hv * stride_state_h
        offsets_s = _state_offsets(offsets_k, offsets_v, stride_state_k, stride_state_v, V, DENSE)
        S_kv = tl.load(state + offsets_s, mask=mask_kv, other=0.0)
        q += b * stride_q_b + h * stride_q_h
        k += b * stride_k_b + h * stride_k_h
        v += b * stride_v_b + hv * stride_v_h
        g += b * stride_g_b + hv * stride_g_h
        beta += b * stride_beta_b + hv * stride_beta_h
        offsets_qk = offsets_k.to(tl.int64) * stride_q_k
        offsets_kk = offsets_k.to(tl.int64) * stride_k_k
        offsets_vv = offsets_v.to(tl.int64) * stride_v_v
        if ON_TENSOR_CORES:
            S_new = _run_one_token(
                S_kv, q, k, v, g, beta, o, scale, offsets_qk, offsets_kk, offsets_vv, offsets_v, mask_k, mask_v
            )
        else:
            S_new = _run_tokens(
                S_kv.to(tl.float32),
                q,
                k,
                v,
                g,
                beta,
                o,
                scale,
                begin,
                end,
                stride_q_t,
                stride_k_t,
                stride_v_t,
                stride_g_t,
                stride_beta_t,
                HV * V,
                offsets_qk,
                offsets_kk,
                offsets_vv,
                offsets_v,
                mask_k,
                mask_v,
                token_state_indices,
                states,
                P,
                stride_state_p,
                offsets_s,
                mask_kv,
            )
        if token_state_indices is None:
            tl.store(state + offsets_s, S_new.to(state.dtype.element_ty), mask=mask_kv)
    else:
        _write_zeros(o, HV * V, begin, end, offsets_v, mask_v)
    if cu_seqlens is not None:
        if n == N - 1:
            _write_zeros(o, HV * V, end, T, offsets_v, mask_v)


def recurrent_configuration(K: int, V: int, state_dtype: torch.dtype, one_token: bool) -> dict[str, int]:
    """Tiles and warps: the fastest of those timed on an H200 (docs/kernels.md), 64 numbers of the state a thread, 128
    if they are of 16 bits. What shares a batch does not count, so that it does not change bits.

    One token: rows of 256 bytes, for memory's sake. More: 32 columns, for few warps wait for each other at every token.
    """
    BK = triton.next_power_of_2(K)
    columns = 256 // state_dtype.itemsize if one_token else 32
    BV = min(triton.next_power_of_2(V), columns, max(16, 16384 // BK))
    num_warps = BK * BV // (4096 if state_dtype.itemsize == 2 else 2048)
    return {"BK": BK, "BV": BV, "num_warps": max(1, min(8, num_warps))}


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence over ``q, k [B, T, H, K]``, ``v [B, T, HV, V]``, ``g, beta [B, T, HV]``, in one launch.

    Without ``beta`` that of gated linear attention.
    Returns ``o [B, T, HV, V]`` in v's dtype and ``final_state [N, HV, K, V]`` in fp32 (``[0, HV, K, V]`` unless
    ``output_final_state``), both contiguous. Tokens past ``cu_seqlens[-1]`` get zeros.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    final_state = torch.empty((N if output_final_state else 0, HV, K, V), dtype=torch.float32, device=v.device)
    if N == 0:
        return o.zero_(), final_state
    configuration = recurrent_configuration(K, V, torch.float32, one_token=T == 1)
    strides = (0, 0, 0, 0) if initial_state is None else initial_state.stride()
    launch(recurrent_forward_kernel)[(N * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        o=o,
        initial_state=initial_state,
        final_state=final_state if output_final_state else None,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        scale=scale,
        T=T,
        N=N,
        stride_q_b=q.stride(0),
        stride_q_t=q.stride(1),
        stride_q_h=q.stride(2),
        stride_q_k=q.stride(3),
        stride_k_b=k.stride(0),
        stride_k_t=k.stride(1),
        stride_k_h=k.stride(2),
        stride_k_k=k.stride(3),
        stride_v_b=v.stride(0),
        stride_v_t=v.stride(1),
        stride_v_h=v.stride(2),
        stride_v_v=v.stride(3),
        stride_g_b=g.stride(0),
        stride_g_t=g.stride(1),
        stride_g_h=g.stride(2),
        stride_beta_b=0 if beta is None else beta.stride(0),
        stride_beta_t=0 if beta is None else beta.stride(1),
        stride_beta_h=0 if beta is None else beta.stride(2),
        stride_initial_n=strides[0],
        stride_initial_h=strides[1],
        stride_initial_k=strides[2],
        stride_initial_v=strides[3],
        H=H,
        HV=HV,
        K=K,
        V=V,
        DENSE=strides[2:] == (V, 1),
        **configuration,
    )
    return o, final_state


def recurrent_update_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    token_state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:
    """The recurrence on a pool ``state [P, HV, K, V]``, updated in place; returns ``o [B, T, HV, V]``.

    Sequence ``n`` uses slot ``state_indices[n]`` (slot ``n`` without them). An index that is no slot, such as the
    padding index -1, touches no state and its tokens get zeros. Two sequences on one slot: the result is undefined.
    With ``token_state_indices [B, T]`` that slot is only read, and each token's receives the state after the token.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    if N == 0:
        return o.zero_()
    on_tensor_cores = (
        T == 1
        and cu_seqlens is None
        and token_state_indices is None
        and state.dtype.itemsize == 2
        and q.dtype == k.dtype == state.dtype
        and min(K, V) >= 16  # of which tensor cores take multiples
    )
    configuration = recurrent_configuration(K, V, state.dtype, one_token=T == 1)
    launch(recurrent_update_kernel)[(N * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        o=o,
        state=state,
        state_indices=None if state_indices is None else state_indices.contiguous(),
        token_state_indices=None if token_state_indices is None else token_state_indices.contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        scale=scale,
        T=T,
        N=N,
        P=state.shape[0],
        stride_q_b=q.stride(0),
        stride_q_t=q.stride(1),
        stride_q_h=q.stride(2),
        stride_q_k=q.stride(3),
        stride_k_b=k.stride(0),
        stride_k_t=k.stride(1),
        stride_k_h=k.stride(2),
        stride_k_k=k.stride(3),
        stride_v_b=v.stride(0),
        stride_v_t=v.stride(1),
        stride_v_h=v.stride(2),
        stride_v_v=v.stride(3),
        stride_g_b=g.stride(0),
        stride_g_t=g.stride(1),
        stride_g_h=g.stride(2),
        stride_beta_b=beta.stride(0),
        stride_beta_t=beta.stride(1),
        stride_beta_h=beta.stride(2),
        stride_state_p=state.stride(0),
        stride_state_h=state.stride(1),
        stride_state_k=state.stride(2),
        stride_state_v=state.stride(3),
        H=H,
        HV=HV,
        K=K,
        V=V,
        DENSE=state.stride()[2:] == (V, 1),
        ON_TENSOR_CORES=on_tensor_cores,
        **configuration,
    )
    return o


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, dtype, state_dtype, H, HV, K, V, T, packed in (
        ("decode bf16", torch.bfloat16, torch.float32, 16, 32, 128, 128, 1, False),
        ("decode bf16 on tensor cores", torch.bfloat16, torch.bfloat16, 16, 32, 128, 128, 1, False),
        ("drafts bf16", torch.bfloat16, torch.float32, 16, 32, 128, 128, 4, False),
        ("wide fp32 packed", torch.float32, torch.bfloat16, 2, 2, 256, 512, 9, True),
        ("odd fp16 packed", torch.float16, torch.float32, 1, 3, 100, 72, 9, True),
    ):

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        N, B = 3, 1 if packed else 3
        q, v = empty(B, T, H, K), empty(B, T, HV, V)
        gates = empty(B, T, HV, dtype=torch.float32)
        state = empty(N, HV, K, V, dtype=torch.float32)
        pool = empty(N, HV, K, V, dtype=state_dtype)
        cu_seqlens, indices = empty(N + 1, dtype=torch.int32) if packed else None, empty(N, dtype=torch.int32)
        token_indices = empty(B, T, dtype=torch.int32) if name.startswith("drafts") else None
        inputs, slots = (q, q, v, gates, gates), (indices, token_indices)
        cases += cases_of_call(f"recurrent {name}", recurrent_forward, *inputs, state, cu_seqlens, 0.1, True)
        cases += cases_of_call(f"recurrent {name}", recurrent_update_, *inputs, pool, *slots, cu_seqlens, 0.1)
    return cases
