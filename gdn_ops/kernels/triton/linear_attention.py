"""Chunkwise gated linear attention (Mamba2's rule) on the GPU: the scan, either way, and the forward pass.

With ``c = cumsum(g)`` inside a chunk of ``C = 64`` tokens and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    P = scale * (Q K^T) * D      O = scale * (exp(c) * (Q S)) + P V      S <- exp(c_C) S + K^T (exp(c_C - c) * V)

**decay_kernel**, one program a (chunk, block of heads), sums the gates: ``c`` in fp64, ``exp(c)`` and ``exp(c_C - c)``.
``intra_chunk.score_kernel`` makes ``P`` of them. Chunks that end early are filled up as ``intra_chunk.py`` says.

**linear_scan_kernel**. One program owns a (segment, value head, tile of ``BV`` value columns) and carries its tile of
the state, values first as in ``chunk_forward.py``, in fp32 registers from chunk to chunk::

    O^T = scale * exp(c) * (S^T Q^T) + V^T P^T                 S^T <- exp(c_C) S^T + (exp(c_C - c) * V^T) K

The gradient of v runs the same way back, with dO for V, K and Q in each other's place, and what stands before a chunk
for what stands after it, so both are one function, :func:`scan_either_way`::

    dV^T = exp(c_C - c) * (dS^T K^T) + dO^T P                  dS^T <- exp(c_C) dS^T + (scale * exp(c) * dO^T) Q

Nothing but ``S^T Q^T`` waits for the state. A left operand is a tile as it was loaded, or what registers hold of the
state or of the values, scaled where it is; a right operand is always a tile as it was loaded (docs/kernels.md, Traps).

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
from gdn_ops.kernels.triton.chunk_forward import (
    _write_zeros,
    aligned,
    aligned_state,
    is_narrow,
    scan_configuration,
    two_tokens,
)
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of, chunk_table, segment_of
from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.intra_chunk import WEAKEST, precision_of, score, strides_of
from gdn_ops.kernels.triton.launch import launch
from gdn_ops.kernels.triton.segments import segment_length

COMBINED = 1024  # elements of a state that one program of linear_combine_kernel carries


@triton.jit
def decay_kernel(
    g,
    c_sum,
    from_start,
    to_end,
    cu_seqlens,
    chunk_offsets,
    T,
    N,
    stride_g_b,
    stride_g_t: tl.constexpr,
    stride_g_h,
    HV: tl.constexpr,
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
    heads = (program % BLOCKS * BH + tl.arange(0, BH)).to(tl.int64)
    mask_h = heads < HV
    g += b * stride_g_b + begin * stride_g_t
    mask = (rows < length)[:, None] & mask_h[None, :]
    g_ch = tl.load(g + rows[:, None] * stride_g_t + heads[None, :] * stride_g_h, mask=mask, other=0.0).to(tl.float64)
    # Not tl.maximum, which would make the weakest gate of a NaN.
    g_ch = tl.where(g_ch < WEAKEST, WEAKEST, g_ch)
    c_ch = tl.cumsum(g_ch, axis=0)
    rest_ch = tl.sum(g_ch, axis=0)[None, :] - c_ch
    here = (chunk * HV + heads[None, :]) * C + rows[:, None]
    tl.store(c_sum + here, c_ch, mask=mask_h[None, :])
    tl.store(from_start + here, tl.exp(c_ch.to(tl.float32)), mask=mask_h[None, :])
    tl.store(to_end + here, tl.exp(rest_ch.to(tl.float32)), mask=mask_h[None, :])


@triton.jit
def scan_either_way(
    program,
    reader,
    writer,
    x,
    P,
    from_start,
    to_end,
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
    stride_reader_t: tl.constexpr,
    stride_reader_h,
    stride_writer_b,
    stride_writer_t: tl.constexpr,
    stride_writer_h,
    stride_x_b,
    stride_x_t: tl.constexpr,
    stride_x_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The work of one program. ``reader, writer, x, out`` are q, k, v, o; with ``REVERSE`` k, q, do, dv, and the
    chunks are taken last one first.

    ``out`` None: not computed. ``enter`` is the state that each segment is entered with (None: zeros); ``states``, if
    not None, gets the one that each chunk is entered with, ``[chunks, HV, V, K]``. ``leave``, if not None, gets what is
    left of a sequence, or, if ``decay`` is not None either, of each segment; the scan forward leaves in ``decay`` by
    how much a segment scales what it is entered with. No early return: the backward has it in a branch.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    hv = (program // NV % HV).to(tl.int64)
    segment = (program // (NV * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    rows = tl.arange(0, C)
    square = rows[:, None] * C + rows[None, :]
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_v = in_v < V
    mask_vk = mask_v[:, None] & mask_k[None, :]
    state_offsets = in_v[:, None] + in_k[None, :] * V
    h = hv // (HV // H)
    if out is not None:
        if not REVERSE:
            if cu_seqlens is not None:
                past = tl.load(cu_seqlens + N)
                if (exists & last & (end == past)) | ((not exists) & (segment == 0)):
                    _write_zeros(out + hv * V + in_v, past, T, HV * V, mask_v, C, BV)

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
    here = chunk * HV + hv
    from_start += here * C
    to_end += here * C
    if out is not None:
        P += here * C * C
        out += ((b * T + token) * HV + hv) * V
    if states is not None:
        states += here * K * V
    STEP: tl.constexpr = -1 if REVERSE else 1

    if enter is None:
        S_vk = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        enter += (segment * HV + hv) * K * V
        S_vk = tl.load(enter + state_offsets, mask=mask_vk & exists, other=0.0).to(tl.float32)
    scaled = 1.0
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    # The decay of a whole chunk is loaded a chunk ahead: its product would wait for it.
    whole = tl.load(from_start + C - 1, mask=chunks > 0, other=1.0)
    for i in range(0, chunks):
        next_whole = tl.load(from_start + STEP * HV * C + C - 1, mask=i + 1 < chunks, other=1.0)
        left = length - i * C
        if REVERSE:
            left = length - (chunks - 1 - i) * C
        real = rows < left
        mask_ck = real[:, None] & mask_k[None, :]
        mask_cv = real[:, None] & mask_v[None, :]
        writer_ck = tl.load(writer + rows[:, None] * stride_writer_t + in_k[None, :], mask=mask_ck, other=0.0)
        x_cv = tl.load(x + rows[:, None] * stride_x_t + in_v[None, :], mask=mask_cv, other=0.0)
        grown_c = tl.load(from_start + rows) * scale
        decay_c = tl.load(to_end + rows)
        on_read = decay_c if REVERSE else grown_c
        on_write = grown_c if REVERSE else decay_c
        S_low = S_vk.to(writer_ck.dtype)
        written_vc = (tl.trans(x_cv).to(tl.float32) * on_write[None, :]).to(x_cv.dtype)
        S_vk = tl.dot(written_vc, writer_ck, S_vk * whole, input_precision=PRECISION)
        if out is not None:
            reader_ck = tl.load(reader + rows[:, None] * stride_reader_t + in_k[None, :], mask=mask_ck, other=0.0)
            p_cc = tl.load(P + square)
            out_vc = tl.dot(S_low, tl.trans(reader_ck), input_precision=PRECISION) * on_read[None, :]
            p_cc = p_cc if REVERSE else tl.trans(p_cc)
            out_vc = tl.dot(tl.trans(x_cv), p_cc, out_vc, input_precision=PRECISION)
            out_cv = tl.trans(out_vc).to(out.dtype.element_ty)
            tl.store(out + rows[:, None] * (HV * V) + in_v[None, :], out_cv, mask=mask_cv)
            P += STEP * HV * C * C
            out += STEP * C * HV * V
            reader += STEP * C * stride_reader_t
        if states is not None:
            tl.store(states + in_v[:, None] * K + in_k[None, :], S_low, mask=mask_vk)
            states += STEP * HV * K * V
        scaled *= whole
        whole = next_whole
        writer += STEP * C * stride_writer_t
        x += STEP * C * stride_x_t
        from_start += STEP * HV * C
        to_end += STEP * HV * C
    if leave is not None:
        if decay is not None:
            tl.store(leave + (segment * HV + hv) * K * V + state_offsets, S_vk, mask=mask_vk & exists)
            if not REVERSE:
                tl.store(decay + segment * HV + hv, scaled, mask=exists & (program % NV == 0))
        else:
            ends = last
            if REVERSE:
                ends = first
            if ends & exists:
                tl.store(leave + (n * HV + hv) * K * V + state_offsets, S_vk, mask=mask_vk)


@triton.jit
def linear_scan_kernel(
    q,
    k,
    v,
    P,
    from_start,
    to_end,
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
    stride_q_t: tl.constexpr,
    stride_q_h,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_v_b,
    stride_v_t: tl.constexpr,
    stride_v_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scan_either_way(
        tl.program_id(0), q, k, v, P, from_start, to_end, o, enter, leave, None, decay, cu_seqlens, chunk_offsets,
        segment_offsets, SEGMENT, scale, T, N, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
        stride_v_b, stride_v_t, stride_v_h, H, HV, K, V, BK, BV, C, PRECISION, False,
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
    """``c``, ``exp(c)`` and ``exp(c_C - c)``, ``[chunks, HV, C]`` in fp64, fp32 and fp32."""

    c_sum: Tensor
    from_start: Tensor
    to_end: Tensor


def decays(g: Tensor, table: ChunkTable) -> Decays:
    T, HV = g.shape[1:]
    dtypes = (torch.float64, torch.float32, torch.float32)
    x = Decays(*(torch.empty((table.chunks, HV, CHUNK), dtype=dtype, device=g.device) for dtype in dtypes))
    BH = min(16, triton.next_power_of_2(HV))
    launch(decay_kernel)[(table.chunks * triton.cdiv(HV, BH),)](
        g=g, **x._asdict(), T=T, **table.arguments(), **strides_of("g", g), HV=HV, BH=BH, C=CHUNK, num_warps=2
    )
    return x


def scores(x: Decays, q: Tensor, k: Tensor, table: ChunkTable, scale: float) -> Tensor:
    """``P [chunks, HV, C, C]`` in q's dtype."""
    P = torch.empty((*x.c_sum.shape, CHUNK), dtype=q.dtype, device=q.device)
    score(q, k, x.c_sum, P, table, scale)
    return P


def linear_scan_configuration(x: Tensor, K: int, V: int, heads: int | None) -> dict[str, int]:
    """The tiles of the delta rule's scan, which multiplies more; not measured yet.

    A warpgroup of 64 value columns needs little enough to have another one beside it, which halves what either waits
    for: so stages are counted in half of the shared memory, but never one (docs/kernels.md, Traps). fp32 operands,
    which are registers', have one: with two, ptxas gives up on some sizes for Hopper (10 KB spilled a thread; 0 with
    one).
    """
    plan, chip, size = scan_configuration(x, K, V, heads), chip_of(x), x.element_size()
    beside = 2 if chip.large and plan["num_warps"] == 4 else 1
    stage = CHUNK * (2 * plan["BK"] + CHUNK + plan["BV"]) * size
    stages = 1 if size == 4 else max(1, min(3, chip.shared_memory // (beside * stage)))
    return {**plan, "num_stages": stages}


def linear_segment_length(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, ways: int = 1) -> int | None:
    """As ``segments.segment_length``: a number for a map costs little, so narrow values fill the chip twice."""
    return segment_length(q, v, cu_seqlens, ways, at_once=2 if v.shape[3] <= 64 else 1)


def linear_scan(
    x: Decays, P: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor | None, enter: Tensor | None, leave: Tensor | None, decay: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches :func:`linear_scan_kernel` on contiguous outputs and states; ``enter`` is that of each segment."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    configuration = linear_scan_configuration(q, K, V, table.heads(HV))
    launch(linear_scan_kernel)[(table.segments * HV * triton.cdiv(V, configuration["BV"]),)](
        q=q, k=k, v=v, P=P, from_start=x.from_start, to_end=x.to_end, o=o, enter=enter, leave=leave, decay=decay,
        scale=scale, T=T, **table.segment_arguments(), **strides_of("q", q), **strides_of("k", k),
        **strides_of("v", v), H=H, HV=HV, K=K, V=V, C=CHUNK, PRECISION=precision_of(q), **configuration,
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
        table = chunk_table(B, T, cu_seqlens, linear_segment_length(q, v, cu_seqlens))
        x, leave = decays(g, table), final_state if output_final_state else None
        if table.segment is not None:
            maps = empty_maps(q, v, table)
            linear_scan(x, None, q, k, v, scale, table, o=None, enter=None, leave=maps.B, decay=maps.decay)
            state = linear_combine(maps, state, leave, T, table, reverse=False)
        P = scores(x, q, k, table, scale)
        linear_scan(x, P, q, k, v, scale, table, o=o, enter=state, leave=leave)
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
