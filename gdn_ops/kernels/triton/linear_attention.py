"""Chunkwise gated linear attention (Mamba2's rule) on the GPU: the scan, either way, and the forward pass.

**decay_kernel**, one program a (chunk, block of heads), sums the gates: ``c = cumsum(g)`` inside a chunk of ``C = 64``
tokens, in fp64, and stores them as two fp32 numbers, ``high + low = c``: the scans subtract sums without fp64.

**linear_scan_kernel**. One program owns a (segment, value head, tile of ``BV`` value columns) and carries its
``[K, BV]`` tile of the state in fp32 registers from chunk to chunk. With ``D_ij = exp(c_i - c_j)`` for ``i >= j``::

    O = scale * (exp(c) * (Q S) + ((Q K^T) * D) V)          S <- exp(c_C) S + K^T (exp(c_C - c) * V)

Nothing is erased, so nothing of a chunk waits for the state but ``Q S``: every operand is read straight from q, k and
v, and there are no buffers between kernels but the sums. ``Q K^T`` is made once a tile of values, which costs less than
writing and reading it (value heads of 64 have one tile). The gradient of v runs the same way back, with dO for V, K and
Q in each other's place, and what stands before a chunk for what stands after it::

    dV = exp(c_C - c) * (K dS) + scale * ((Q K^T) * D)^T dO          dS <- exp(c_C) dS + Q^T (scale * exp(c) * dO)

so both are one function, :func:`scan_either_way`.

**Segments.** With few heads a program owns a segment of the sequence (``segments.py`` says when). A segment's map of
the state is ``S -> a S + B`` with a number ``a``: a first scan makes ``a`` and ``B`` of each, **linear_combine_kernel**
walks over them element by element, and the scan proper runs on all segments at once from the right states.

Narrow heads, padding, and single tokens are as in ``chunk_forward.py``. Same inputs, same bits: no atomics. Source:
arXiv 2405.21060, section 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.batch_invariance import is_batch_invariant
from gdn_ops.kernels.triton import recurrent
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_forward import aligned, aligned_state, is_narrow, two_tokens
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import WEAKEST, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.segments import segment_length

COMBINED = 1024  # elements of a state that one program of linear_combine_kernel carries


@triton.jit
def decay_kernel(
    g,
    high,
    low,
    cu_seqlens,
    chunk_offsets,
    T,
    N,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    HV: tl.constexpr,
    BH: tl.constexpr,
    C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (HV + BH - 1) // BH
    program = tl.program_id(0)
    b, begin, length = chunk_of((program // BLOCKS).to(tl.int64), T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    rows = tl.arange(0, C)
    heads = (program % BLOCKS * BH + tl.arange(0, BH)).to(tl.int64)
    mask = (rows < length)[:, None] & (heads < HV)[None, :]
    g += b * stride_g_b + begin * stride_g_t
    g_ch = tl.load(g + rows[:, None] * stride_g_t + heads[None, :] * stride_g_h, mask=mask, other=0.0).to(tl.float64)
    # Not tl.maximum, which would make the weakest gate of a NaN.
    c_ch = tl.cumsum(tl.where(g_ch < WEAKEST, WEAKEST, g_ch), axis=0)
    high_ch = c_ch.to(tl.float32)
    low_ch = (c_ch - high_ch.to(tl.float64)).to(tl.float32)
    here = (b * HV + heads[None, :]) * T + begin + rows[:, None]
    tl.store(high + here, high_ch, mask=mask)
    tl.store(low + here, low_ch, mask=mask)


@triton.jit
def pair_decay(high_c, low_c, real, C: tl.constexpr, REVERSE: tl.constexpr):
    """``D [C, C]``: ``exp(c_i - c_j)`` for ``i >= j``; with ``REVERSE`` its transpose. Zeros elsewhere."""
    rows = tl.arange(0, C)
    high_cc = high_c[:, None] - high_c[None, :]
    low_cc = low_c[:, None] - low_c[None, :]
    both = real[:, None] & real[None, :]
    if REVERSE:
        return tl.exp(tl.where((rows[:, None] <= rows[None, :]) & both, -(high_cc + low_cc), float("-inf")))
    else:
        return tl.exp(tl.where((rows[:, None] >= rows[None, :]) & both, high_cc + low_cc, float("-inf")))


@triton.jit
def scan_either_way(
    program,
    reader,
    writer,
    x,
    high,
    low,
    out,
    enter,
    leave,
    states,
    decay,
    cu_seqlens,
    chunk_offsets,
    segment_offsets,
    SEGMENT,
    scale,
    T,
    N,
    stride_reader_b,
    stride_reader_t,
    stride_reader_h,
    stride_writer_b,
    stride_writer_t,
    stride_writer_h,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The work of one program. ``reader, writer, x, out`` are q, k, v, o; with ``REVERSE`` k, q, do, dv, and the
    chunks are taken last one first.

    ``out`` None: not computed. ``enter`` is the state that each segment is entered with (None: zeros); ``states``, if
    not None, gets the one that each chunk is entered with. ``leave``, if not None, gets what is left of a sequence, or,
    if ``decay`` is not None either, of each segment; the scan forward leaves in ``decay`` by how much a segment scales
    what it is entered with. No early return: the backward has it in a branch.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    rows = tl.arange(0, C)
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    mask_kv = mask_k[:, None] & mask_v[None, :]
    state_offsets = in_k[:, None] * V + in_v[None, :]
    h = hv // (HV // H)
    if out is not None:
        if not REVERSE:
            if cu_seqlens is not None:
                # Tokens past the last packed sequence belong to none.
                past = tl.load(cu_seqlens + N)
                if (exists & last & (end == past)) | ((not exists) & (segment == 0)):
                    zeros = tl.zeros([C, BV], dtype=out.dtype.element_ty)
                    for start in range(past, T, C):
                        token = start + rows
                        tail = out + (token[:, None] * HV + hv) * V + in_v[None, :]
                        tl.store(tail, zeros, mask=(token < T)[:, None] & mask_v[None, :])

    length = tl.where(exists, end - begin, 0).to(tl.int32)
    chunks = (length + C - 1) // C
    chunk = first_chunk
    token = begin
    if REVERSE:
        chunk += chunks - 1
        token += (chunks - 1) * C
    reader += b * stride_reader_b + token * stride_reader_t + h * stride_reader_h
    writer += b * stride_writer_b + token * stride_writer_t + h * stride_writer_h
    x += b * stride_x_b + token * stride_x_t + hv * stride_x_h
    high += (b * HV + hv) * T + token
    low += (b * HV + hv) * T + token
    if out is not None:
        out += ((b * T + token) * HV + hv) * V
    if states is not None:
        states += (chunk * HV + hv) * K * V
    STEP: tl.constexpr = -1 if REVERSE else 1

    if enter is None:
        S_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        enter += (segment * HV + hv) * K * V
        S_kv = tl.load(enter + state_offsets, mask=mask_kv & exists, other=0.0).to(tl.float32)
    scaled = 1.0
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    for i in range(0, chunks):
        left = tl.minimum(length - i * C, C)
        if REVERSE:
            left = tl.minimum(length - (chunks - 1 - i) * C, C)
        real = rows < left
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        writer_ck = tl.load(writer + rows[:, None] * stride_writer_t + in_k[None, :], mask=mask_ck, other=0.0)
        x_cv = tl.load(x + rows[:, None] * stride_x_t + in_v[None, :], mask=mask_cv, other=0.0)
        high_c = tl.load(high + rows, mask=real, other=0.0)
        low_c = tl.load(low + rows, mask=real, other=0.0)
        high_end = tl.load(high + left - 1)
        low_end = tl.load(low + left - 1)
        from_start = tl.exp(high_c) * scale
        to_end = tl.exp((high_end - high_c) + (low_end - low_c))
        on_read = to_end if REVERSE else from_start
        on_write = from_start if REVERSE else to_end
        S_low = S_kv.to(writer_ck.dtype)
        if out is not None:
            reader_ck = tl.load(reader + rows[:, None] * stride_reader_t + in_k[None, :], mask=mask_ck, other=0.0)
            # First of the products, and nothing else between it and its operands: docs/kernels.md, Traps.
            out_cv = tl.dot(reader_ck, S_low, input_precision=PRECISION) * on_read[:, None]
            if BQ == BK:
                pairs = tl.dot(reader_ck, tl.trans(writer_ck), input_precision=PRECISION)
            else:
                pairs = tl.zeros([C, C], dtype=tl.float32)
                for at in range(0, K, BQ):
                    columns = at + tl.arange(0, BQ)
                    mask_cq = real[:, None] & (columns < K)[None, :]
                    r_cq = tl.load(reader + rows[:, None] * stride_reader_t + columns[None, :], mask=mask_cq, other=0.0)
                    w_cq = tl.load(writer + rows[:, None] * stride_writer_t + columns[None, :], mask=mask_cq, other=0.0)
                    pairs = tl.dot(r_cq, tl.trans(w_cq), pairs, input_precision=PRECISION)
            D = pair_decay(high_c, low_c, real, C, REVERSE) * scale
            pairs = (pairs * D).to(x_cv.dtype)
            out_cv = tl.dot(pairs, x_cv, out_cv, input_precision=PRECISION)
            out_offsets = rows[:, None] * (HV * V) + in_v[None, :]
            tl.store(out + out_offsets, out_cv.to(out.dtype.element_ty), mask=mask_cv)
            out += STEP * C * HV * V
            reader += STEP * C * stride_reader_t
        if states is not None:
            tl.store(states + state_offsets, S_low, mask=mask_kv)
            states += STEP * HV * K * V
        written_cv = (x_cv.to(tl.float32) * on_write[:, None]).to(x_cv.dtype)
        whole = tl.exp(high_end)
        S_kv = tl.dot(tl.trans(writer_ck), written_cv, S_kv * whole, input_precision=PRECISION)
        scaled *= whole
        writer += STEP * C * stride_writer_t
        x += STEP * C * stride_x_t
        high += STEP * C
        low += STEP * C
    if leave is not None:
        if decay is not None:
            tl.store(leave + (segment * HV + hv) * K * V + state_offsets, S_kv, mask=mask_kv & exists)
            if not REVERSE:
                tl.store(decay + segment * HV + hv, scaled, mask=exists & (program % NV == 0))
        else:
            ends = last
            if REVERSE:
                ends = first
            if ends & exists:
                tl.store(leave + (n * HV + hv) * K * V + state_offsets, S_kv, mask=mask_kv)


@triton.jit
def linear_scan_kernel(
    q,
    k,
    v,
    high,
    low,
    o,
    enter,
    leave,
    decay,
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
    stride_v_b,
    stride_v_t,
    stride_v_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scan_either_way(
        tl.program_id(0), q, k, v, high, low, o, enter, leave, None, decay, cu_seqlens, chunk_offsets, segment_offsets,
        SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b,
        stride_v_t, stride_v_h, H, HV, K, V, BK, BQ, BV, C, PRECISION, False,
    )  # fmt: skip


@triton.jit
def linear_combine_kernel(
    B,
    decay,
    enter,
    states,
    leave,
    segment_offsets,
    SEGMENT,
    T,
    N,
    HV: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """From ``enter [N, HV, SIZE]`` (None: zeros) ``states``, what each segment is entered with.

    With ``REVERSE`` the last one comes first. A sequence without segments hands ``enter`` on to ``leave``, if not None.
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    hv = (program // BLOCKS % HV).to(tl.int64)
    n = (program // (BLOCKS * HV)).to(tl.int64)
    if segment_offsets is None:
        parts = tl.cdiv(tl.cdiv(T, C), SEGMENT)
        segment = n * parts
    else:
        segment = tl.load(segment_offsets + n)
        parts = (tl.load(segment_offsets + n + 1) - segment).to(tl.int32)
    offsets = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    if enter is None:
        S = tl.zeros([BLOCK], dtype=tl.float32)
    else:
        S = tl.load(enter + (n * HV + hv) * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)
    if leave is not None:
        if parts == 0:
            tl.store(leave + (n * HV + hv) * SIZE + offsets, S, mask=mask)
    STEP: tl.constexpr = -1 if REVERSE else 1
    if REVERSE:
        segment += parts - 1
    for _ in range(0, parts):
        at = segment * HV + hv
        tl.store(states + at * SIZE + offsets, S, mask=mask)
        S = S * tl.load(decay + at) + tl.load(B + at * SIZE + offsets, mask=mask, other=0.0)
        segment += STEP


class Decays(NamedTuple):
    """``high + low`` is the sum of the gates from a chunk's start to a token; ``[B, HV, T]`` fp32."""

    high: Tensor
    low: Tensor


def decays(g: Tensor, table: ChunkTable) -> Decays:
    B, T, HV = g.shape
    x = Decays(*(torch.empty((B, HV, T), dtype=torch.float32, device=g.device) for _ in range(2)))
    BH = min(16, triton.next_power_of_2(HV))
    launch(decay_kernel)[(table.chunks * triton.cdiv(HV, BH),)](
        g=g, high=x.high, low=x.low, T=T, **table.arguments(), **strides_of("g", g), HV=HV, BH=BH, C=CHUNK, num_warps=2
    )
    return x


def linear_scan_configuration(x: Tensor, K: int, V: int, heads: int | None) -> dict[str, int]:
    """Tile and launch parameters of a scan over ``x``'s dtype on its device, by the reasons of
    ``chunk_forward.scan_configuration``; not measured yet.

    ``heads`` is the number of (segment, value head) pairs, None when it is symbolic. A program multiplies Q K^T anew,
    so tiles of 64 columns are taken whenever each multiprocessor gets a program. A step of a scan keeps reader, writer
    and x in shared memory; two stages are the least for 16-bit operands on Hopper. fp32 operands are multiplied in
    registers: eight warps, and Q K^T by 32 columns of keys at a time. So are 16-bit ones where there are no warpgroup
    products: by 64, or keys of 256 spill 4 KB a thread.
    """
    size, chip = x.element_size(), chip_of(x)
    BK = max(16, triton.next_power_of_2(K))
    BV = 16
    if size == 2 and BK <= 128:
        BV = 32 if heads is not None and heads * triton.cdiv(V, 64) < chip.multiprocessors else 64
    BV = max(16, min(BV, triton.next_power_of_2(V)))
    BQ = min(BK, 32 if size == 4 else BK if chip.large else 64)
    stage = CHUNK * (2 * BK + BV) * size
    stages = max(1, min(3, (chip.shared_memory - (BK * BV + CHUNK * (CHUNK + BV)) * size) // stage))
    return {"BK": BK, "BQ": BQ, "BV": BV, "num_warps": 4 if size == 2 else 8, "num_stages": stages}


def linear_scan(
    x: Decays, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor | None, enter: Tensor | None, leave: Tensor | None, decay: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches :func:`linear_scan_kernel` on contiguous outputs and states; ``enter`` is that of each segment."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    configuration = linear_scan_configuration(q, K, V, table.heads(HV))
    launch(linear_scan_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, v=v, high=x.high, low=x.low, o=o, enter=enter, leave=leave, decay=decay, scale=scale, T=T,
        **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
        H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
    )  # fmt: skip


class LinearMaps(NamedTuple):
    """``S -> decay * S + B`` of each segment: ``B [segments, HV, K, V]``, ``decay [segments, HV]``, fp32."""

    B: Tensor
    decay: Tensor


def empty_maps(q: Tensor, v: Tensor, table: ChunkTable) -> LinearMaps:
    shape = (table.segments, v.shape[2], q.shape[3], v.shape[3])
    B = torch.empty(shape, dtype=torch.float32, device=q.device)
    return LinearMaps(B, torch.empty(shape[:2], dtype=torch.float32, device=q.device))


def linear_combine(
    x: LinearMaps, enter: Tensor | None, leave: Tensor | None, T: int, table: ChunkTable, reverse: bool
) -> Tensor:
    """What each segment is entered with, ``[segments, HV, K, V]``; ``leave`` gets ``enter`` for sequences without
    tokens."""
    HV, K, V = x.B.shape[1:]
    states = torch.empty_like(x.B)
    launch(linear_combine_kernel)[(table.sequences * HV * triton.cdiv(K * V, COMBINED),)](
        B=x.B, decay=x.decay, enter=enter, states=states, leave=leave, segment_offsets=table.segment_offsets,
        SEGMENT=table.segment, T=T, N=table.sequences, HV=HV, SIZE=K * V, BLOCK=COMBINED, C=CHUNK, REVERSE=reverse,
        num_warps=4,
    )  # fmt: skip
    return states


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``o [B, T, HV, V]`` in v's dtype and ``final_state [N, HV, K, V]`` in fp32 (no rows unless asked for)."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rest = (initial_state, cu_seqlens, scale, output_final_state)
    if isinstance(T, int) and T == 1:
        if not is_batch_invariant():
            return recurrent_forward(q, k, v, g, *rest)
        o, final_state = chunk_forward(*map(two_tokens, (q, k, v, g)), *rest)
        return o[:, :1].contiguous(), final_state
    if is_narrow(q, v):
        wide = (x.to(torch.float32) for x in (q, k, v))
        o, final_state = chunk_forward(*wide, g, *rest)
        return o.to(v.dtype), final_state
    q, k, v = aligned(q), aligned(k), aligned(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = torch.empty(
        (N if output_final_state else 0, HV, q.shape[3], v.shape[3]), dtype=torch.float32, device=v.device
    )
    state = aligned_state(initial_state, q, v)
    if N == 0:
        o.zero_()
    elif isinstance(T, int) and T == 0:
        if output_final_state:
            final_state.zero_() if state is None else final_state.copy_(state)
    else:
        table = chunk_table(B, T, cu_seqlens, segment_length(q, v, cu_seqlens))
        x, leave = decays(g, table), final_state if output_final_state else None
        if table.segment is not None:
            maps = empty_maps(q, v, table)
            linear_scan(x, q, k, v, scale, table, o=None, enter=None, leave=maps.B, decay=maps.decay)
            state = linear_combine(maps, state, leave, T, table, reverse=False)
        linear_scan(x, q, k, v, scale, table, o=o, enter=state, leave=leave)
    return o[..., :V].contiguous(), final_state[:, :, :K, :V].contiguous()


def recurrent_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same token by token, by the kernel of ``recurrent.py``."""
    return recurrent.recurrent_forward(q, k, v, g, None, initial_state, cu_seqlens, scale, output_final_state)


AHEAD_OF_TIME = (
    ("bf16 mamba2", torch.bfloat16, 1, 24, 128, 64, False),
    ("bf16 segments", torch.bfloat16, 1, 2, 64, 64, False),
    ("bf16 packed", torch.bfloat16, 2, 2, 64, 64, True),
    ("fp16 wide", torch.float16, 2, 2, 256, 512, False),
    ("fp32 odd", torch.float32, 1, 2, 100, 72, True),
)


def ahead_of_time_inputs(dtype: torch.dtype, H: int, HV: int, K: int, V: int, packed: bool) -> tuple:
    """Tensors without storage for ``chunk_forward`` at one shape."""
    T, N = 4096, 3 if packed else 1

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    state, gates = empty(N, HV, K, V, dtype=torch.float32), empty(1, T, HV, dtype=torch.float32)
    cu_seqlens = empty(N + 1, dtype=torch.int32) if packed else None
    return empty(1, T, H, K), empty(1, T, H, K), empty(1, T, HV, V), gates, state, cu_seqlens


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, *shape in AHEAD_OF_TIME:
        inputs = ahead_of_time_inputs(*shape)
        cases += cases_of_call(f"linear_attention {name}", chunk_forward, *inputs, 0.1, True)
        cases += cases_of_call(f"recurrent linear {name}", recurrent_forward, *inputs, 0.1, True)
    return cases
