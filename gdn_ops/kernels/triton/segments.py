"""Parallelism along the sequence: a segment of chunks is an affine map of the state, ``S -> M S + B``.

A scan has one program a (sequence, value head, tile of value columns); with few of them most of the chip idles. Then
each sequence is cut into segments, and a scan takes three steps:

1. **map_kernel**: one program a (segment, value head, tile of columns) runs the state's recurrence over its segment,
   without outputs, from the identity (which gives columns of ``M [K, K]``) or from zero (columns of ``B [K, V]``).
   The first segment runs from the sequence's own state, so its ``B`` is the state after it and it needs no ``M``;
   nothing needs what the last one would give.
2. **combine_kernel**: one program a (sequence, value head, tile of columns) walks over the segments,
   ``S <- M S + B`` from the second on, and leaves the state before each.
3. The scan itself, one program a (segment, ...), from those states.

In the backward the gradient of the state goes the other way, ``dS -> M^T dS + B'``, with the same ``M``; ``B'`` is
what the reverse scan makes of zero, in the last segment of the gradient of the final state. The first segment needs
none. The maps are applied with fp32 accuracy. Which segments are taken changes the rounding of the result;
``batch_invariance.py`` keeps sequences whole. The scheme is FlashInfer's and FlashQLA's (segment-parallel prefill).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.batch_invariance import is_batch_invariant
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, segment_of
from gdn_ops.kernels.triton.intra_chunk import IntraChunk, high, low_of, precision_of, strides_of
from gdn_ops.kernels.triton.launch import launch

# combine_kernel holds a [BK, BK] map in registers, and takes up to 96 KiB of shared memory at 128 columns; wider keys
# have more programs anyhow. Chips with 64 KiB cut no sequences of keys wider than half of that.
WIDEST = 128
SHORTEST = 8  # chunks: combine_kernel takes as long for a segment as a scan for two chunks
FEWEST = 3  # segments: two take as long as one, with their maps


def segment_length(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, ways: int = 1, at_once: int = 1, columns: int | None = None
) -> int | None:
    """Chunks a segment, so that the programs of a scan, of ``columns`` of values (None: those of the portable scan),
    fill the chip once, ``at_once`` on a multiprocessor; None where whole sequences do, of which ``ways`` scans run at
    the same time.

    Under a compiler, T or the number of sequences may be a symbol: an unknown length is cut every 32 chunks, and an
    unknown number of sequences is taken to be large. Taken from these times of an H100 (``K = V = 128``, bf16): of a
    chunk, 3.3 us in a scan of 128 value columns, 4.3 in two of them both ways, 2 in the maps; of a segment, 3.4 us in
    ``combine_kernel``.
    """
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chip = chip_of(q)
    widest = WIDEST if chip.shared_memory > 98304 else WIDEST // 2
    if is_batch_invariant() or widest < K or not isinstance(N, int):
        return None
    columns = columns or (128 if chip.large and q.element_size() == 2 else 32)
    parts = at_once * chip.multiprocessors // (N * HV * triton.cdiv(V, columns) * ways)
    if parts < FEWEST:
        return None
    if not isinstance(T, int):
        return 32
    chunks = triton.cdiv(T, CHUNK) if cu_seqlens is None else triton.cdiv(triton.cdiv(T, CHUNK), N)
    parts = min(parts, chunks // SHORTEST)
    return None if parts < FEWEST else triton.cdiv(chunks, parts)


@triton.jit
def _map_columns(
    k,
    v,
    transition,
    from_start,
    to_end,
    enter,
    out,
    columns,
    length,
    first,
    stride_k_t: tl.constexpr,
    stride_v_t: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_KEY: tl.constexpr,
):
    """Columns of ``M [K, K]`` where ``OF_KEY``, and then no values are written, or of ``B [K, V]`` into ``out``, the
    latter of the ``first`` segment from ``enter`` (None: zeros). With ``LOW``, ``M`` is ``[2, K, K]``: two terms
    (``intra_chunk._product``)."""
    WIDTH: tl.constexpr = K if OF_KEY else V
    rows = tl.arange(0, C)
    in_k = tl.arange(0, BK)
    mask_k = in_k < K
    mask_v = columns < WIDTH
    at = in_k[None, :] * WIDTH + columns[:, None]
    mask = mask_k[None, :] & mask_v[:, None]
    S_vk = tl.zeros([BV, BK], dtype=tl.float32)
    if OF_KEY:
        S_vk = tl.where(columns[:, None] == in_k[None, :], 1.0, 0.0)
    elif enter is not None:
        S_vk = tl.load(enter + at, mask=mask & first, other=0.0).to(tl.float32)
    whole = tl.load(from_start + C - 1, mask=length > 0, other=1.0)
    for start in range(0, length, C):
        next_whole = tl.load(from_start + HV * C + C - 1, mask=start + C < length, other=1.0)
        real = rows < length - start
        k_ck = tl.load(k + rows[:, None] * stride_k_t + in_k[None, :], mask=real[:, None] & mask_k[None, :], other=0.0)
        t_cc = tl.load(transition + rows[:, None] * C + rows[None, :])
        grown_c = tl.load(from_start + rows)
        decay_c = tl.load(to_end + rows)
        S_low = S_vk.to(k_ck.dtype)  # before any product: docs/kernels.md, Traps
        if OF_KEY:
            stored_vc = tl.dot(S_low, tl.trans(k_ck), input_precision=PRECISION)
            erased_vc = (stored_vc * -grown_c[None, :]).to(k_ck.dtype)
            new_vc = tl.dot(erased_vc, tl.trans(t_cc), input_precision=PRECISION)
        else:
            mask_cv = real[:, None] & mask_v[None, :]
            v_cv = tl.load(v + rows[:, None] * stride_v_t + columns[None, :], mask=mask_cv, other=0.0)
            u_vc = tl.dot(tl.trans(v_cv), tl.trans(t_cc), input_precision=PRECISION)
            stored_vc = tl.dot(S_low, tl.trans(k_ck), input_precision=PRECISION)
            erased_vc = (stored_vc * -grown_c[None, :]).to(k_ck.dtype)
            new_vc = tl.dot(erased_vc, tl.trans(t_cc), u_vc, input_precision=PRECISION)
            v += C * stride_v_t
        decayed_vc = (new_vc * decay_c[None, :]).to(k_ck.dtype)
        S_vk = tl.dot(decayed_vc, k_ck, S_vk * whole, input_precision=PRECISION)
        whole = next_whole
        k += C * stride_k_t
        transition += HV * C * C
        from_start += HV * C
        to_end += HV * C
    TERMS: tl.constexpr = 2 if OF_KEY and LOW is not None else 1
    if TERMS == 2:
        M0_vk = high(S_vk)
        tl.store(out + at, M0_vk.to(LOW), mask=mask)
        tl.store(out + K * K + at, (S_vk - M0_vk).to(LOW), mask=mask)
    else:
        tl.store(out + at, S_vk, mask=mask)


@triton.jit
def map_kernel(
    k,
    v,
    transition,
    from_start,
    to_end,
    enter,
    M,
    B,
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``M`` of segments neither first nor last of their sequence, ``B`` of all but the last; the first segment's from
    ``enter [N, HV, K, V]`` (None: zeros)."""
    NK: tl.constexpr = (K + BV - 1) // BV
    TILES: tl.constexpr = NK + (V + BV - 1) // BV
    program = tl.program_id(0)
    hv = (program // TILES % HV).to(tl.int64)
    segment = (program // (TILES * HV)).to(tl.int64)
    n, b, begin, end, first_chunk, first, last, exists = segment_of(
        segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C
    )
    tile = program % TILES
    if (not exists) | last | (first & (tile < NK)):
        return
    k += b * stride_k_b + begin * stride_k_t + hv // (HV // H) * stride_k_h
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    here = (first_chunk * HV + hv) * C
    transition += here * C
    from_start += here
    to_end += here
    length = (end - begin).to(tl.int32)
    columns = tl.where(tile < NK, tile, tile - NK) * BV + tl.arange(0, BV)
    if tile < NK:
        m_at = M + (segment * HV + hv) * K * K * (1 if LOW is None else 2)
        _map_columns(
            k, v, transition, from_start, to_end, None, m_at, columns, length, first, stride_k_t, stride_v_t, HV, K, V,
            BK, BV, C, LOW, PRECISION, True,
        )  # fmt: skip
    else:
        b_at = B + (segment * HV + hv) * K * V
        if enter is not None:
            enter += (n * HV + hv) * K * V
        _map_columns(
            k, v, transition, from_start, to_end, enter, b_at, columns, length, first, stride_k_t, stride_v_t, HV, K, V,
            BK, BV, C, LOW, PRECISION, False,
        )  # fmt: skip


@triton.jit
def combine_kernel(
    M,
    B,
    enter,
    states,
    leave,
    segment_offsets,
    SEGMENT,
    T,
    N,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """``states`` of each segment: before it, or with ``REVERSE``, where the last comes first, after it.

    The first has ``enter [N, HV, K, V]`` (None: zeros), the second the first one's ``B``, which was made of ``enter``.
    A sequence without segments hands ``enter`` on to ``leave`` (unless None).
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    hv = (program // NV % HV).to(tl.int64)
    n = (program // (NV * HV)).to(tl.int64)
    if segment_offsets is None:
        parts = tl.cdiv(tl.cdiv(T, C), SEGMENT)
        first = n * parts
    else:
        first = tl.load(segment_offsets + n)
        parts = (tl.load(segment_offsets + n + 1) - first).to(tl.int32)
    in_k = tl.arange(0, BK)
    in_v = program % NV * BV + tl.arange(0, BV)
    mask_k = in_k < K
    mask_kk = mask_k[:, None] & mask_k[None, :]
    mask_kv = mask_k[:, None] & (in_v < V)[None, :]
    offsets_kk = in_k[:, None] * K + in_k[None, :]
    offsets_kv = in_k[:, None] * V + in_v[None, :]
    if enter is None:
        S_kv = tl.zeros([BK, BV], dtype=tl.float32)
    else:
        S_kv = tl.load(enter + (n * HV + hv) * K * V + offsets_kv, mask=mask_kv, other=0.0).to(tl.float32)
    at = (first + parts - 1 if REVERSE else first) * HV + hv
    if parts > 0:
        tl.store(states + at * K * V + offsets_kv, S_kv, mask=mask_kv)
    else:
        if leave is not None:
            tl.store(leave + (n * HV + hv) * K * V + offsets_kv, S_kv, mask=mask_kv)
    S_kv = tl.load(B + at * K * V + offsets_kv, mask=mask_kv & (parts > 1), other=0.0)
    at += -HV if REVERSE else HV
    for _ in range(0, parts - 2):
        tl.store(states + at * K * V + offsets_kv, S_kv, mask=mask_kv)
        b_kv = tl.load(B + at * K * V + offsets_kv, mask=mask_kv, other=0.0)
        if LOW is None:
            m_kk = tl.load(M + at * K * K + offsets_kk, mask=mask_kk, other=0.0)
            m_kk = tl.trans(m_kk) if REVERSE else m_kk
            S_kv = tl.dot(m_kk, S_kv, input_precision=PRECISION) + b_kv
        else:
            m0_kk = tl.load(M + 2 * at * K * K + offsets_kk, mask=mask_kk, other=0.0)
            m1_kk = tl.load(M + (2 * at + 1) * K * K + offsets_kk, mask=mask_kk, other=0.0)
            m0_kk = tl.trans(m0_kk) if REVERSE else m0_kk
            m1_kk = tl.trans(m1_kk) if REVERSE else m1_kk
            S0_kv = high(S_kv)
            S1_kv = (S_kv - S0_kv).to(LOW)
            S0_kv = S0_kv.to(LOW)
            S_kv = tl.dot(m0_kk, S0_kv, tl.dot(m0_kk, S1_kv, tl.dot(m1_kk, S0_kv))) + b_kv
        at += -HV if REVERSE else HV
    tl.store(states + at * K * V + offsets_kv, S_kv, mask=mask_kv & (parts > 1))


class Maps(NamedTuple):
    """``M [segments, HV, 1, K, K]`` in fp32, or for 16-bit inputs two terms of it in bfloat16 (``[.., 2, K, K]``);
    ``B [segments, HV, K, V]`` in fp32."""

    M: Tensor
    B: Tensor


def map_configuration(x: Tensor, K: int) -> dict[str, int]:
    """Sixty-four columns are one warpgroup's products; two such programs fit on a multiprocessor."""
    low = x.element_size() == 2
    BK, BV = max(16, triton.next_power_of_2(K)), 64 if low else 16
    stages = max(1, min(3, chip_of(x).shared_memory // (CHUNK * (BK + CHUNK + BV) * x.element_size())))
    return {"BK": BK, "BV": BV, "num_warps": 4 if low else 8, "num_stages": stages}


def maps(x: IntraChunk, k: Tensor, v: Tensor, table: ChunkTable, enter: Tensor | None) -> Maps:
    """The maps of sequences that begin with ``enter [N, HV, K, V]`` (None: zeros). What nothing needs is not written:
    ``M`` of a sequence's first and last segment, ``B`` of its last."""
    T, H, K = k.shape[1:]
    HV, V = v.shape[2:]
    low = low_of(k)
    terms, dtype = (1, torch.float32) if low is None else (2, torch.bfloat16)
    M = torch.empty((table.segments, HV, terms, K, K), dtype=dtype, device=k.device)
    B = torch.empty((table.segments, HV, K, V), dtype=torch.float32, device=k.device)
    configuration = map_configuration(k, K)
    BV = configuration["BV"]
    launch(map_kernel)[(table.segments * HV * (triton.cdiv(K, BV) + triton.cdiv(V, BV)),)](
        k=k, v=v, transition=x.T, from_start=x.from_start, to_end=x.to_end, enter=enter, M=M, B=B, T=T,
        **strides_of("k", k), **strides_of("v", v), H=H, HV=HV, K=K, V=V, C=CHUNK,
        LOW=low, PRECISION=precision_of(k), **table.segment_arguments(), **configuration,
    )  # fmt: skip
    return Maps(M, B)


def combine_configuration(x: Tensor, K: int, V: int, sequences: int | None) -> dict[str, int]:
    """``sequences`` (of a head each; None: unknown) have their columns on twice as many programs while these fit. Maps
    of three segments, 192 KiB of 16-bit terms, hide their latency."""
    chip, low = chip_of(x), x.element_size() == 2
    widest = 16 if low and sequences is not None and sequences * triton.cdiv(V, 16) <= chip.multiprocessors else 32
    BK, BV = max(16, triton.next_power_of_2(K)), min(widest, max(16, triton.next_power_of_2(V)))
    stages = 1 + low + chip.large  # one of fp32 maps is all that small chips have room for
    return {"BK": BK, "BV": BV, "num_warps": 8, "num_stages": stages}


def combine(
    x: Maps, enter: Tensor | None, leave: Tensor | None, like: Tensor, T: int, table: ChunkTable, reverse: bool
) -> Tensor:
    """The state before each segment (with ``reverse``, its gradient after each) ``[segments, HV, K, V]``.

    ``enter`` is what the maps were made of. ``like`` gives the dtype whose accuracy is wanted; ``leave`` gets ``enter``
    for sequences without tokens.
    """
    HV, K, V = x.B.shape[1:]
    states = torch.empty_like(x.B)
    known = isinstance(table.sequences, int)
    configuration = combine_configuration(like, K, V, table.sequences * HV if known else None)
    launch(combine_kernel)[(table.sequences * HV * triton.cdiv(V, configuration["BV"]),)](
        M=x.M, B=x.B, enter=enter, states=states, leave=leave, segment_offsets=table.segment_offsets,
        SEGMENT=table.segment, T=T, N=table.sequences, HV=HV, K=K, V=V, C=CHUNK,
        LOW=low_of(like), PRECISION=precision_of(like), REVERSE=reverse, **configuration,
    )  # fmt: skip
    return states
