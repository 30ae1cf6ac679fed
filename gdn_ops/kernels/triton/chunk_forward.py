"""The chunkwise gated delta rule on the GPU, forward: ``intra_chunk`` for all chunks at once, then one scan.

**scan_kernel**. One program owns a (sequence, value head, tile of ``BV`` value columns) and carries its ``[K, BV]``
tile of the state in fp32 registers from chunk to chunk (the columns of the state never meet)::

    V' = U - W S          O = (scale * exp(c) * Q) S + P V'          S <- exp(c_C) S + K^T (exp(c_C - c) * V')

Four products a chunk, of which only ``W S -> V' -> K^T V'`` is a chain; the loads of the next chunks are in flight
meanwhile. The backward runs the same scan with ``states`` and ``written`` (the state before each chunk, and V') in
place of ``o``.

Same inputs, same bits: no atomics, and a program's order of work depends on its own sequence only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import (
    CHUNK,
    IntraChunk,
    intra_chunk,
    multiprocessors_of,
    precision_of,
    rows_contiguous,
    shared_memory_of,
    warps,
)
from gdn_ops.kernels.triton.launch import launch


@triton.jit
def sequence_of(n, T, cu_seqlens, chunk_offsets, C: tl.constexpr):
    """Row of the batch, bounds in tokens, and the number of its first chunk, of sequence ``n``."""
    if cu_seqlens is None:
        b = n
        begin = n * 0
        end = begin + T
        first_chunk = n * tl.cdiv(T, C)
    else:
        b = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), begin), T)
        first_chunk = tl.load(chunk_offsets + n).to(tl.int64)
    return b, begin, end, first_chunk


@triton.jit
def scan_kernel(
    q,
    k,
    W,
    U,
    P,
    from_start,
    to_end,
    o,
    initial_state,
    final_state,
    states,
    written,
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``o`` None: not computed (but ``states`` and ``written``); ``initial_state`` and ``final_state`` may be None."""
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

    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    here = (b * HV + hv) * T + begin
    W += here * K
    U += here * V
    P += here * C
    from_start += here
    to_end += here
    if o is not None:
        o += ((b * T + begin) * HV + hv) * V
    else:
        states += (first_chunk * HV + hv) * K * V
        written += here * V

    if initial_state is None:
        S_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        S_kv = tl.load(initial_state + (n * HV + hv) * K * V + state_offsets, mask=mask_kv, other=0.0).to(tl.float32)
    length = (end - begin).to(tl.int32)
    for start in range(0, length, C):
        real = rows < length - start
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        last = tl.minimum(length - start, C) - 1
        w_ck = tl.load(W + rows[:, None] * K + in_k[None, :], mask=mask_ck, other=0.0)
        k_ck = tl.load(k + rows[:, None].to(tl.int64) * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
        decay_c = tl.load(to_end + rows, mask=real, other=0.0)
        whole = tl.load(from_start + last)
        S_low = S_kv.to(w_ck.dtype)
        stored_cv = tl.dot(w_ck, S_low, input_precision=PRECISION)
        # After the product: Triton 3.6 drops the barrier between the operands' proxy fence and a wgmma when a layout
        # change (which has a barrier of its own) stands between them, and the product reads stale shared memory.
        u_cv = tl.load(U + rows[:, None] * V + in_v[None, :], mask=mask_cv, other=0.0)
        new_cv = u_cv.to(tl.float32) - stored_cv
        if o is not None:
            q_ck = tl.load(q + rows[:, None].to(tl.int64) * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
            p_cc = tl.load(P + rows[:, None] * C + rows[None, :], mask=real[:, None], other=0.0)
            grown_c = tl.load(from_start + rows, mask=real, other=0.0) * scale
            o_cv = tl.dot(q_ck, S_low, input_precision=PRECISION) * grown_c[:, None]
            o_cv = tl.dot(p_cc, new_cv.to(p_cc.dtype), o_cv, input_precision=PRECISION)
            o_offsets = rows[:, None].to(tl.int64) * (HV * V) + in_v[None, :]
            tl.store(o + o_offsets, o_cv.to(o.dtype.element_ty), mask=mask_cv)
            o += C * HV * V
        else:
            tl.store(states + state_offsets, S_low, mask=mask_kv)
            tl.store(written + rows[:, None] * V + in_v[None, :], new_cv.to(written.dtype.element_ty), mask=mask_cv)
            states += HV * K * V
            written += C * V
        decayed_cv = (new_cv * decay_c[:, None]).to(k_ck.dtype)
        S_kv = tl.dot(tl.trans(k_ck), decayed_cv, S_kv * whole, input_precision=PRECISION)
        q += C * stride_q_t
        k += C * stride_k_t
        W += C * K
        U += C * V
        P += C * C
        from_start += C
        to_end += C
    if final_state is not None:
        tl.store(final_state + (n * HV + hv) * K * V + state_offsets, S_kv, mask=mask_kv)
    if cu_seqlens is not None:
        if o is not None:
            if n == N - 1:
                zeros = tl.zeros([C, BV], dtype=o.dtype.element_ty)
                o -= (length + C - 1) // C * C * HV * V
                for start in range(length, (T - begin).to(tl.int32), C):
                    token = start + rows
                    mask = (token < T - begin)[:, None] & mask_v[None, :]
                    tl.store(o + token[:, None].to(tl.int64) * (HV * V) + in_v[None, :], zeros, mask=mask)


def scan_configuration(x: Tensor, T: int, K: int, V: int, heads: int | None) -> dict[str, int]:
    """Tile and launch parameters of a scan over ``x``'s dtype on its device; ``heads`` is None when it is symbolic.

    Measured on an H200 (``K = V = 128``, bf16): ``BV=32``, four warps, three stages while every program has a
    multiprocessor of its own; with more than that, ``BV=64`` reads W, Q, K and P fewer times. With one stage, products
    of 16-bit operands are *wrong* there (see :func:`warps`), so wide keys get narrow tiles that leave room for two.
    """
    size = x.element_size()
    BK = max(16, triton.next_power_of_2(K))
    BV = 32 if size == 2 and BK <= 128 else 16
    if BV == 32 and heads is not None and heads * triton.cdiv(V, 32) > multiprocessors_of(x):
        BV = 64
    BV = max(16, min(BV, triton.next_power_of_2(V)))
    stage = CHUNK * (3 * BK + CHUNK + BV) * size
    stages = max(1, min(3, (shared_memory_of(x) - BK * BV * size) // stage))
    return {"BK": BK, "BV": BV, "num_warps": warps(x, T, K, V), "num_stages": stages}


def scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, *,
    o: Tensor | None = None, initial_state: Tensor | None = None, final_state: Tensor | None = None,
    states: Tensor | None = None, written: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches :func:`scan_kernel` on contiguous outputs and states."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    configuration = scan_configuration(q, T, K, V, x.sequences * HV if isinstance(x.sequences, int) else None)
    launch(scan_kernel)[(x.sequences * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, W=x.W, U=x.U, P=x.P, from_start=x.from_start, to_end=x.to_end, o=o,
        initial_state=initial_state, final_state=final_state, states=states, written=written,
        cu_seqlens=x.cu_seqlens, chunk_offsets=x.chunk_offsets, scale=scale, T=T, N=x.sequences,
        stride_q_b=q.stride(0), stride_q_t=q.stride(1), stride_q_h=q.stride(2),
        stride_k_b=k.stride(0), stride_k_t=k.stride(1), stride_k_h=k.stride(2),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``o [B, T, HV, V]`` in v's dtype and ``final_state [N, HV, K, V]`` in fp32 (no rows unless asked for)."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    final_state = torch.empty((N if output_final_state else 0, HV, K, V), dtype=torch.float32, device=v.device)
    if N == 0:
        return o.zero_(), final_state
    if T == 0:
        if output_final_state:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return o, final_state
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    initial_state = None if initial_state is None else initial_state.contiguous()
    x = intra_chunk(q, k, v, g, beta, cu_seqlens, scale)
    final = final_state if output_final_state else None
    scan(x, q, k, v, scale, o=o, initial_state=initial_state, final_state=final)
    return o, final_state


def ahead_of_time_inputs(dtype: torch.dtype, H: int, HV: int, K: int, V: int, packed: bool) -> tuple:
    """Tensors without storage for ``chunk_forward`` at one shape."""
    T, N = 1024, 3 if packed else 1

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    state = empty(N, HV, K, V, dtype=torch.float32)
    cu_seqlens = empty(N + 1, dtype=torch.int32) if packed else None
    gates = empty(1, T, HV, dtype=torch.float32)
    return empty(1, T, H, K), empty(1, T, H, K), empty(1, T, HV, V), gates, gates, state, cu_seqlens


AHEAD_OF_TIME = (
    ("bf16", torch.bfloat16, 2, 4, 128, 128, False),
    ("bf16 packed", torch.bfloat16, 2, 2, 64, 64, True),
    ("fp16 wide", torch.float16, 2, 2, 256, 512, False),
    ("fp32 odd", torch.float32, 1, 2, 100, 72, True),
)


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        cases += cases_of_call(f"chunk_forward {name}", chunk_forward, *ahead_of_time_inputs(*shape), 0.1, True)
    return cases
