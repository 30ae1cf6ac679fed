"""Which tokens a chunk, a segment and a sequence hold: shared by the kernels of the chunkwise rule.

A chunk is ``C = 64`` neighbouring tokens of one sequence (fewer at its end), a segment some neighbouring chunks.
Dense batches need no table. For packed sequences one small kernel makes ``[N + 1]`` tables on the device: the bounds,
clamped and made non-decreasing (so that wrong bounds give wrong numbers, never an access outside a tensor), the number
of chunks and the number of segments before each sequence. Grids are bounded by ``cdiv(T, C) + N - 1`` chunks, and
programs past the last one return at once: no host synchronisation, and CUDA graphs capture it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.compile_case import CompileCase, cases_of_call
from gdn_ops.kernels.triton.launch import launch

CHUNK = 64
TABLE_BLOCK = 256


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def chunk_table_kernel(
    cu_seqlens,
    bounds,
    chunk_offsets,
    segment_offsets,
    T,
    N,
    SEGMENT,
    C: tl.constexpr,
    BN: tl.constexpr,
):
    """``segment_offsets`` and ``SEGMENT`` may be None."""
    reached = (tl.program_id(0) * 0).to(tl.int64)
    reached_before = reached
    chunks = reached
    segments = reached
    for start in range(0, N + 1, BN):
        i = start + tl.arange(0, BN)
        here = tl.load(cu_seqlens + i, mask=i <= N, other=0).to(tl.int64)
        before = tl.load(cu_seqlens + i - 1, mask=(i >= 1) & (i <= N), other=0).to(tl.int64)
        here = tl.minimum(tl.maximum(here, 0), T)
        before = tl.minimum(tl.maximum(before, 0), T)
        here = tl.maximum(tl.associative_scan(here, 0, _maximum), reached)
        before = tl.maximum(tl.associative_scan(before, 0, _maximum), reached_before)
        counts = tl.where((i >= 1) & (i <= N), (here - before + (C - 1)) // C, 0)
        tl.store(bounds + i, here, mask=i <= N)
        tl.store(chunk_offsets + i, tl.cumsum(counts, axis=0) + chunks, mask=i <= N)
        if segment_offsets is not None:
            parts = (counts + (SEGMENT - 1)) // SEGMENT
            tl.store(segment_offsets + i, tl.cumsum(parts, axis=0) + segments, mask=i <= N)
            segments += tl.sum(parts, axis=0)
        chunks += tl.sum(counts, axis=0)
        reached = tl.max(here, axis=0)
        reached_before = tl.max(before, axis=0)


@triton.jit
def _search(index, offsets, N):
    """The last ``n`` in ``0 .. N - 1`` with ``offsets[n] <= index``: the sequence that holds it."""
    low = index * 0
    high = low + N
    while low + 1 < high:
        middle = (low + high) // 2
        after = tl.load(offsets + middle) <= index
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    return low


@triton.jit
def chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C: tl.constexpr):
    """Row of the batch, first token and number of tokens (0: there is no such chunk) of a chunk."""
    if cu_seqlens is None:
        NT = tl.cdiv(T, C)
        b = (chunk // NT).to(tl.int64)
        begin = (chunk % NT).to(tl.int64) * C
        length = tl.minimum(T - begin, C)
    else:
        n = _search(chunk, chunk_offsets, N)
        b = (chunk * 0).to(tl.int64)
        begin = tl.load(cu_seqlens + n) + (chunk - tl.load(chunk_offsets + n)) * C
        length = tl.maximum(tl.minimum(tl.load(cu_seqlens + n + 1) - begin, C), 0)
        length = tl.where(chunk < tl.load(chunk_offsets + N), length, 0)
    return b, begin, length


@triton.jit
def segment_of(segment, T, N, SEGMENT, cu_seqlens, chunk_offsets, segment_offsets, C: tl.constexpr):
    """Of a segment: its sequence, row of the batch, first token, token after its last, first chunk, whether it is the
    first and the last of its sequence, and whether there is one. ``SEGMENT`` None: segments are whole sequences."""
    exists = segment >= 0
    first = exists
    last = exists
    if cu_seqlens is None:
        NT = tl.cdiv(T, C)
        n = segment
        begin = segment * 0
        end = begin + T
        first_chunk = n * NT
        if SEGMENT is not None:
            parts = tl.cdiv(NT, SEGMENT)
            n = segment // parts
            part = segment % parts
            begin = part * SEGMENT * C
            end = tl.minimum(begin + SEGMENT * C, T)
            first_chunk = n * NT + part * SEGMENT
            first = part == 0
            last = part == parts - 1
        b = n
    else:
        n = segment
        if SEGMENT is not None:
            n = _search(segment, segment_offsets, N)
        b = n * 0
        begin = tl.load(cu_seqlens + n)
        end = tl.load(cu_seqlens + n + 1)
        first_chunk = tl.load(chunk_offsets + n)
        if SEGMENT is not None:
            exists = segment < tl.load(segment_offsets + N)
            part = segment - tl.load(segment_offsets + n)
            first = part == 0
            begin += part * SEGMENT * C
            last = begin + SEGMENT * C >= end
            end = tl.minimum(begin + SEGMENT * C, end)
            first_chunk += part * SEGMENT
    return n, b, begin, end, first_chunk, first, last, exists


class ChunkTable(NamedTuple):
    """How the chunks and segments of one call are numbered; None where there is nothing to look up."""

    cu_seqlens: Tensor | None
    chunk_offsets: Tensor | None
    segment_offsets: Tensor | None
    chunks: int
    sequences: int
    segment: int | None
    segments: int

    def heads(self, HV: int, ways: int = 1) -> int | None:
        """(segment, value head) pairs of ``ways`` scans; None under a compiler that does not know it."""
        return ways * self.segments * HV if isinstance(self.segments, int) else None

    def arguments(self) -> dict:
        """What a kernel over chunks takes of it."""
        return {"N": self.sequences, "cu_seqlens": self.cu_seqlens, "chunk_offsets": self.chunk_offsets}

    def segment_arguments(self) -> dict:
        """What a kernel over segments takes of it."""
        return {**self.arguments(), "segment_offsets": self.segment_offsets, "SEGMENT": self.segment}


def chunk_table(B: int, T: int, cu_seqlens: Tensor | None, segment: int | None) -> ChunkTable:
    """``segment`` is the number of chunks a segment, None for whole sequences."""
    if cu_seqlens is None:
        chunks = triton.cdiv(T, CHUNK)
        segments = B if segment is None else B * triton.cdiv(chunks, segment)
        return ChunkTable(None, None, None, B * chunks, B, segment, segments)
    N = cu_seqlens.shape[0] - 1

    def table():
        return torch.empty((N + 1,), dtype=torch.int64, device=cu_seqlens.device)

    bounds, chunk_offsets, segment_offsets = table(), table(), None if segment is None else table()
    launch(chunk_table_kernel)[(1,)](
        cu_seqlens=cu_seqlens.contiguous(), bounds=bounds, chunk_offsets=chunk_offsets,
        segment_offsets=segment_offsets, T=T, N=N, SEGMENT=segment, C=CHUNK, BN=TABLE_BLOCK, num_warps=4,
    )  # fmt: skip
    chunks = triton.cdiv(T, CHUNK) + N - 1
    segments = N if segment is None else triton.cdiv(triton.cdiv(T, CHUNK), segment) + N - 1
    return ChunkTable(bounds, chunk_offsets, segment_offsets, chunks, N, segment, segments)


def ahead_of_time_cases() -> list[CompileCase]:
    cases = []
    for name, dtype, segment in (("int32 whole", torch.int32, None), ("int64 segments", torch.int64, 8)):
        cu_seqlens = torch.empty((4,), dtype=dtype, device="meta")
        cases += cases_of_call(f"chunk_table {name}", chunk_table, 1, 1024, cu_seqlens, segment)
    return cases
