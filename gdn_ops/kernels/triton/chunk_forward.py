"""The chunkwise gated delta rule on the GPU, forward: ``intra_chunk`` for all chunks at once, then one scan.

**scan_kernel**. One program owns a (sequence, value head, tile of ``BV`` value columns) and carries its ``[K, BV]``
tile of the state in fp32 registers from chunk to chunk (the columns of the state never meet)::

    V' = U - W S          O = (scale * exp(c) * Q) S + P V'          S <- exp(c_C) S + K^T (exp(c_C - c) * V')

Four products a chunk, of which only ``W S -> V' -> K^T V'`` is a chain; the loads of the next chunks are in flight
meanwhile. The backward runs the same scan with ``states`` and ``written`` (the state before each chunk, and V') in
place of ``o``. With few heads a program owns a segment of the sequence instead (``segments.py``).

Heads narrower than a tensor core's tile (16) are computed in fp32, and 16-bit features are padded to multiples of 16,
which keeps every row on a 16-byte boundary. A single token is the recurrent kernel's, unless its bits must be those
that it has in company (``batch_invariance.py``).

Same inputs, same bits: no atomics, and a program's order of work depends on its own sequence only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.batch_invariance import is_batch_invariant
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, intra_chunk, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.recurrent import recurrent_forward
from gdn_ops.kernels.triton.segments import combine, maps, segment_length


@triton.jit
def _write_zeros(o, begin, end, stride_t, mask_v, C: tl.constexpr, BV: tl.constexpr):
    """Tokens past the last packed sequence belong to none."""
    rows = tl.arange(0, C)
    zeros = tl.zeros([C, BV], dtype=o.dtype.element_ty)
    for start in range(begin, end, C):
        token = start + rows
        tl.store(o[None, :] + token[:, None] * stride_t, zeros, mask=(token < end)[:, None] & mask_v[None, :])


@triton.jit
def scan_segment(
    program,
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The work of one program: ``o`` None: not computed (but ``states`` and ``written``). ``initial_state`` is a
    segment's; None: zeros. ``final_state`` is a sequence's, or None. No early return: the backward has it in a branch.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, _, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    rows = tl.arange(0, C)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_v = in_v < V
    if o is not None:
        if cu_seqlens is not None:
            past = tl.load(cu_seqlens + N)
            if (exists & last & (end == past)) | ((not exists) & (segment == 0)):
                _write_zeros(o + hv * V + in_v, past, T, HV * V, mask_v, C, BV)
    h = hv // (HV // H)
    in_k = tl.arange(0, BK)
    mask_k = in_k < K
    mask_kv = mask_k[:, None] & mask_v[None, :]
    state_offsets = in_k[:, None] * V + in_v[None, :]

    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    here = (b * HV + hv) * T + begin
    W += here * K
    U += here * V
    from_start += here
    to_end += here
    if o is not None:
        P += here * C
        o += ((b * T + begin) * HV + hv) * V
    else:
        states += (first_chunk * HV + hv) * K * V
        written += here * V

    if initial_state is None:
        S_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        initial_state += (segment * HV + hv) * K * V
        S_kv = tl.load(initial_state + state_offsets, mask=mask_kv & exists, other=0.0).to(tl.float32)
    length = tl.where(exists, end - begin, 0).to(tl.int32)
    for start in range(0, length, C):
        real = rows < length - start
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        left = tl.minimum(length - start, C) - 1
        w_ck = tl.load(W + rows[:, None] * K + in_k[None, :], mask=mask_ck, other=0.0)
        k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=mask_ck, other=0.0)
        decay_c = tl.load(to_end + rows, mask=real, other=0.0)
        whole = tl.load(from_start + left)
        S_low = S_kv.to(w_ck.dtype)
        stored_cv = tl.dot(w_ck, S_low, input_precision=PRECISION)
        # After the product: Triton 3.6 drops the barrier between the operands' proxy fence and a wgmma when a layout
        # change (which has a barrier of its own) stands between them, and the product reads stale shared memory.
        u_cv = tl.load(U + rows[:, None] * V + in_v[None, :], mask=mask_cv, other=0.0)
        new_cv = u_cv.to(tl.float32) - stored_cv
        if o is not None:
            q_ck = tl.load(q + rows[:, None] * stride_q_t + in_k[None, :], mask=mask_ck, other=0.0)
            p_cc = tl.load(P + rows[:, None] * C + rows[None, :], mask=real[:, None], other=0.0)
            grown_c = tl.load(from_start + rows, mask=real, other=0.0) * scale
            o_cv = tl.dot(q_ck, S_low, input_precision=PRECISION) * grown_c[:, None]
            o_cv = tl.dot(p_cc, new_cv.to(p_cc.dtype), o_cv, input_precision=PRECISION)
            o_offsets = rows[:, None] * (HV * V) + in_v[None, :]
            tl.store(o + o_offsets, o_cv.to(o.dtype.element_ty), mask=mask_cv)
            o += C * HV * V
            P += C * C
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
        from_start += C
        to_end += C
    if final_state is not None:
        if last & exists:
            tl.store(final_state + (n * HV + hv) * K * V + state_offsets, S_kv, mask=mask_kv)


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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scan_segment(
        tl.program_id(0), q, k, W, U, P, from_start, to_end, o, initial_state, final_state, None, None, cu_seqlens,
        chunk_offsets, segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b,
        stride_k_t, stride_k_h, H, HV, K, V, BK, BV, C, PRECISION,
    )  # fmt: skip


def scan_configuration(x: Tensor, K: int, V: int, heads: int | None) -> dict[str, int]:
    """Tile and launch parameters of a scan over ``x``'s dtype on its device.

    ``heads`` is the number of (segment, value head) pairs, None when it is symbolic. Measured on an H200
    (``K = V = 128``, bf16): ``BV=32``, four warps, three stages while every program has a multiprocessor of its own;
    with more than that, ``BV=64`` reads W, Q, K and P fewer times. With one stage, Triton 3.6's code for 16-bit
    operands is *wrong* on Hopper, so wide keys get narrow tiles that leave room for two. fp32 operands are multiplied
    in registers, which takes eight warps.
    """
    size, chip = x.element_size(), chip_of(x)
    BK = max(16, triton.next_power_of_2(K))
    BV = 32 if size == 2 and BK <= 128 else 16
    if BV == 32 and heads is not None and heads * triton.cdiv(V, 32) > chip.multiprocessors:
        BV = 64
    BV = max(16, min(BV, triton.next_power_of_2(V)))
    stage = CHUNK * (3 * BK + CHUNK + BV) * size
    stages = max(1, min(3, (chip.shared_memory - BK * BV * size) // stage))
    return {"BK": BK, "BV": BV, "num_warps": 4 if size == 2 else 8, "num_stages": stages}


def scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """Launches :func:`scan_kernel` on contiguous outputs and states; ``initial_state`` is that of each segment."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    heads = table.segments * HV if isinstance(table.segments, int) else None
    configuration = scan_configuration(q, K, V, heads)
    launch(scan_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, W=x.W, U=x.U, P=x.P, from_start=x.from_start, to_end=x.to_end, o=o,
        initial_state=initial_state, final_state=final_state, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


def is_narrow(q: Tensor, v: Tensor) -> bool:
    """Whether the heads are narrower than a tensor core's tile: then 16-bit inputs are computed in fp32."""
    return q.element_size() == 2 and min(q.shape[3], v.shape[3]) < 16


def aligned(x: Tensor) -> Tensor:
    """``x [B, T, H, features]`` with features side by side and rows on 16-byte boundaries; 16-bit features are padded.

    A chunk of it spans fewer than 2^31 elements, so that offsets inside one are 32-bit.
    """
    if x.element_size() == 2 and x.shape[-1] % 16 != 0:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    if x.is_contiguous():
        return x
    # The batch's stride last: it may be a symbol, whose remainder would become a guard.
    even = all(stride % 16 == 0 for stride in x.stride()[-2::-1]) and x.storage_offset() % 8 == 0
    return x if x.stride(-1) == 1 and even and x.stride(1) <= 2**24 else x.contiguous()


def two_tokens(x: Tensor) -> Tensor:
    """``x [B, 1, ...]`` and a token of zeros, which changes nothing: it writes nothing and decays nothing.

    A length of one is a constant to Triton, which then drops the loop over chunks; version 3.6's code for what remains
    reads shared memory out of range on Hopper.
    """
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))


def aligned_state(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor | None:
    """A contiguous state of the padded heads."""
    if state is None:
        return None
    padding = (0, v.shape[3] - state.shape[3], 0, q.shape[3] - state.shape[2])
    return torch.nn.functional.pad(state, padding) if any(padding) else state.contiguous()


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``o [B, T, HV, V]`` in v's dtype and ``final_state [N, HV, K, V]`` in fp32 (no rows unless asked for)."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rest = (initial_state, cu_seqlens, scale, output_final_state)
    if isinstance(T, int) and T == 1:
        if not is_batch_invariant():
            return recurrent_forward(q, k, v, g, beta, *rest)
        o, final_state = chunk_forward(*map(two_tokens, (q, k, v, g, beta)), *rest)
        return o[:, :1].contiguous(), final_state
    if is_narrow(q, v):
        wide = (x.to(torch.float32) for x in (q, k, v))
        o, final_state = chunk_forward(*wide, g, beta, *rest)
        return o.to(v.dtype), final_state
    q, k, v = aligned(q), aligned(k), aligned(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = torch.empty(
        (N if output_final_state else 0, HV, q.shape[3], v.shape[3]), dtype=torch.float32, device=v.device
    )
    initial_state = aligned_state(initial_state, q, v)
    if N == 0:
        o.zero_()
    elif isinstance(T, int) and T == 0:
        if output_final_state:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    else:
        table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens))
        x = intra_chunk(q, k, v, g, beta, table, scale)
        final = final_state if output_final_state else None
        if table.segment is not None:
            initial_state = combine(maps(x, k, v, table, last=False), initial_state, final, q, T, table, reverse=False)
        scan(x, q, k, v, scale, table, o=o, initial_state=initial_state, final_state=final)
    return o[..., :V].contiguous(), final_state[:, :, :K, :V].contiguous()


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
