"""The scan on Hopper where all of its programs run at once (``hopper.has_room``), so that the time of one counts.

A program of ``scan.py`` has two chains of products, each with its outputs between them. One of these has half of the
values, and the chain to itself:

- **a loader**, one warp, keeps ``STAGES`` chunks of tiles in flight by the copy engine (TMA).
- **a writer**, one warpgroup, has the products from state to state and nothing else. The state is transposed, so that
  their left operands are registers::

      W^T = V^T T^T                                       a chunk ahead: nothing of it waits for the state
      V'^T = W^T - (exp(c) * (S^T K^T)) T^T
      S^T <- exp(c_C) S^T + (exp(c_C - c) * V'^T) K

- **two readers**, a warpgroup each, have every other chunk. They make its scores before the state is known, and take
  the state and V' from shared memory, where the writer leaves both while its next product runs::

      O = scale * exp(c) * (Q S) + P V'                   P = scale (Q K^T) * D

The numbers are those of ``scan.py``, bit by bit. docs/kernels.md says what each is worth where. Where whole sequences
leave half of the chip idle they are taken in parts (``narrow_scan_by_parts``), and that half inverts meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gdn_ops.kernels.hopper import NARROW
from gdn_ops.kernels.hopper.invert import inverse_by_parts, squares
from gdn_ops.kernels.hopper.tiles import (
    ALONG_C,
    BK,
    LEFT_C,
    LEFT_K,
    OF_C,
    OF_K,
    chunks_between,
    decays,
    heads,
    hidden,
    last_of,
    likeness,
    piece_of,
    rows_of,
    state_tile,
    transformed,
)
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import STRETCH, IntraChunk

STAGES = 3
# Of four warpgroups, one of them for the loader; the writer has what the others leave.
REGISTERS, REGISTERS_TO_READ, REGISTERS_TO_LOAD = 128, 144, 24


@gluon.jit
def _stage(number, STAGES: gl.constexpr):
    """Where the ``number``-th chunk of a program is, and the phase of the barriers there."""
    return number % STAGES, number // STAGES & 1


@gluon.jit
def _load(tensors, tiles, full, empty, work, H: gl.constexpr, HV: gl.constexpr, V: gl.constexpr):
    q, k, v, transition, sums, from_start, to_end = tensors
    q_s, k_s, v_s, t_s, c_s, g_s, d_s = tiles
    items, programs, T, SEGMENT, since, until = work
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    STAGES: gl.constexpr = k_s.shape[0]
    BYTES: gl.constexpr = (
        q.block_type.nbytes
        + k.block_type.nbytes
        + v.block_type.nbytes
        + transition.block_type.nbytes
        + sums.block_type.nbytes
        + from_start.block_type.nbytes
        + to_end.block_type.nbytes
    )
    before = 0
    for item in range(gl.program_id(0), items, programs):
        b, hv, v0, first, chunks, _segment, NT = piece_of(item, T, SEGMENT, HV, V, C, BV, since, until)
        h = hv // (HV // H)
        for i in range(chunks):
            stage, phase = _stage(before + i, STAGES)
            row = (b * NT + first + i) * HV + hv
            token = (first + i) * C
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            tma.async_copy_global_to_shared(k, [b, h, token, 0], ready, k_s.index(stage))
            tma.async_copy_global_to_shared(v, [b, hv, token, v0], ready, v_s.index(stage))
            tma.async_copy_global_to_shared(transition, [row * C, 0], ready, t_s.index(stage))
            tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(stage))
            tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(stage))
            tma.async_copy_global_to_shared(sums, [row, 0], ready, c_s.index(stage))
            tma.async_copy_global_to_shared(q, [b, h, token, 0], ready, q_s.index(stage))
        before += chunks


@gluon.jit
def _write(states, tiles, kept, barriers, work, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    initial_state, final_state = states
    _, k_s, v_s, t_s, _, g_s, d_s = tiles
    s_s, n_s = kept
    full, empty, known, written, free = barriers
    items, programs, T, SEGMENT, since, until = work
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype

    none = gl.zeros([BV, C], gl.float32, OF_C)
    number = 0
    last = 0
    mbarrier.wait(full.index(0), 0)
    w_vc = transformed(v_s, t_s, 0)
    for item in range(gl.program_id(0), items, programs):
        b, hv, v0, first, chunks, segment, _NT = piece_of(item, T, SEGMENT, HV, V, C, BV, since, until)
        if initial_state is None:
            S_vk = gl.zeros([BV, BK], gl.float32, OF_K)
        else:
            at = initial_state + (segment * HV + hv).to(gl.int64) * (K * V)
            offsets, mask = state_tile(v0, K, V, BK, BV)
            S_vk = gl.load(at + offsets, mask=mask, other=0.0).to(gl.float32)
        for i in range(chunks):
            stage = number % STAGES
            turn = number & 1
            freed = (number >> 1 & 1) ^ 1
            k_ck = k_s.index(stage).reshape([C, BK])
            t_jc = t_s.index(stage).permute((1, 0))
            low_vk = S_vk.to(dtype)
            stored_vc = warpgroup_mma(
                gl.convert_layout(low_vk, LEFT_C), k_ck.permute((1, 0)), none, use_acc=False, is_async=True
            )
            grown_c = g_s.index(stage).reshape([C]).load(ALONG_C)
            decay_c = d_s.index(stage).reshape([C]).load(ALONG_C)
            mbarrier.wait(free.index(turn), freed)
            whole = last_of(g_s.index(stage))
            s_s.index(turn).store(low_vk)
            fence_async_shared()
            mbarrier.arrive(known.index(turn), count=1)
            mbarrier.arrive(empty.index(last), count=1, pred=number > 0)  # here it holds up nothing
            S_vk = S_vk * whole
            stored_vc, w_vc = warpgroup_mma_wait(0, deps=(stored_vc, w_vc))
            erased_vc = gl.convert_layout((stored_vc * -grown_c[None, :]).to(dtype), LEFT_C)
            new_vc = warpgroup_mma(erased_vc, t_jc, w_vc, is_async=True)
            new_vc = warpgroup_mma_wait(0, deps=(new_vc,))
            decayed_vc = gl.convert_layout((new_vc * decay_c[None, :]).to(dtype), LEFT_K)
            S_vk = warpgroup_mma(decayed_vc, k_ck, S_vk, is_async=True)
            n_s.index(turn).store(new_vc.to(dtype))
            fence_async_shared()
            mbarrier.arrive(written.index(turn), count=1)

            number += 1
            ahead, phase_ahead = _stage(number, STAGES)
            mbarrier.wait(full.index(ahead), phase_ahead, pred=(i + 1 < chunks) | (item + programs < items))
            w_vc = transformed(v_s, t_s, ahead)
            S_vk = warpgroup_mma_wait(1, deps=(S_vk,))
            last = stage
        if final_state is not None:
            # Once more, so that nothing of it stays in registers through the loop.
            b, hv, v0, first, chunks, _segment, _NT = piece_of(hidden(item), T, SEGMENT, HV, V, C, BV, since, until)
            if first + chunks == until:
                at = final_state + (b * HV + hv).to(gl.int64) * (K * V)
                offsets, mask = state_tile(v0, K, V, BK, BV)
                gl.store(at + offsets, S_vk, mask=mask)
    warpgroup_mma_wait(0, deps=(w_vc,))


@gluon.jit
def _read(o, scales, tiles, kept, o_s, barriers, work, HV: gl.constexpr, V: gl.constexpr, part: gl.constexpr):
    scale, score_scale = scales
    q_s, k_s, v_s, _, c_s, g_s, _ = tiles
    s_s, n_s = kept
    full, empty, known, written, free = barriers
    items, programs, T, SEGMENT, since, until = work
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype
    row_c: gl.constexpr = gl.SliceLayout(1, OF_C)
    none = gl.zeros([C, BV], gl.float32, OF_C)
    lower = gl.arange(0, C, row_c)[:, None] >= gl.arange(0, C, ALONG_C)[None, :]
    o_tile = o_s.index(part)
    before = 0
    for item in range(gl.program_id(0), items, programs):
        b, hv, v0, first, chunks, _segment, _NT = piece_of(item, T, SEGMENT, HV, V, C, BV, since, until)
        for i in range((before & 1) ^ part, chunks, 2):
            stage, phase = _stage(before + i, STAGES)
            turn = before + i >> 1 & 1
            mbarrier.wait(full.index(stage), phase)
            qk_cj = likeness(q_s, k_s, stage, 1, 0)
            D_cj = decays(c_s, stage, score_scale, C, 1, 0)
            grown_c = g_s.index(stage).reshape([C]).load(row_c) * scale
            qk_cj = warpgroup_mma_wait(0, deps=(qk_cj,))
            P_cj = gl.convert_layout(gl.where(lower, qk_cj * D_cj, 0.0).to(dtype), LEFT_C)
            mbarrier.wait(known.index(part), turn)
            q_ck = q_s.index(stage).reshape([C, BK])
            o_cv = warpgroup_mma(q_ck, s_s.index(part).permute((1, 0)), none, use_acc=False, is_async=True)
            o_cv = warpgroup_mma_wait(0, deps=(o_cv,))
            mbarrier.arrive(empty.index(stage), count=1)
            o_cv = o_cv * grown_c[:, None]
            mbarrier.wait(written.index(part), turn)
            o_cv = warpgroup_mma(P_cj, n_s.index(part).permute((1, 0)), o_cv, is_async=True)
            tma.store_wait(0)
            o_cv = warpgroup_mma_wait(0, deps=(o_cv,))
            mbarrier.arrive(free.index(part), count=1)
            o_tile.reshape([C, BV]).store(o_cv.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o, [b, hv, (first + i) * C, v0], o_tile)
        before += chunks
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["since", "until"])
def hopper_narrow_scan_kernel(
    q,
    k,
    v,
    transition,
    sums,
    from_start,
    to_end,
    o,
    initial_state,
    final_state,
    scale,
    score_scale,
    T,
    SEGMENT,
    since,
    until,
    items,
    programs,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    TO_READ: gl.constexpr,
    TO_LOAD: gl.constexpr,
):
    """Arguments are those of ``hopper_scan_kernel``, and which chunks of every sequence count. A program takes every
    ``programs``-th of the ``items``: where there is room one, but it is right for any number."""
    gdc_launch_dependents()  # the inverse of the next part may begin
    C: gl.constexpr = k.block_type.shape[2]
    BK: gl.constexpr = k.block_type.shape[3]
    BV: gl.constexpr = v.block_type.shape[3]
    dtype: gl.constexpr = k.dtype
    two: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q.block_type.shape, q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES] + v.block_type.shape, v.layout)
    t_s = gl.allocate_shared_memory(dtype, [STAGES] + transition.block_type.shape, transition.layout)
    c_s = gl.allocate_shared_memory(gl.float32, [STAGES] + sums.block_type.shape, sums.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [STAGES] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [STAGES] + to_end.block_type.shape, to_end.layout)
    s_s = gl.allocate_shared_memory(dtype, [2, BV, BK], two)
    n_s = gl.allocate_shared_memory(dtype, [2, BV, C], two)
    o_s = gl.allocate_shared_memory(dtype, [2] + o.block_type.shape, o.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # the writer, and the reader whose turn it is
    for i in gl.static_range(2):
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(written.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()

    tensors = (q, k, v, transition, sums, from_start, to_end)
    tiles = (q_s, k_s, v_s, t_s, c_s, g_s, d_s)
    kept = (s_s, n_s)
    barriers = (full, empty, known, written, free)
    scales = (scale, score_scale)
    work = (items, programs, T, SEGMENT, since, until)
    gdc_wait()  # for the kernel before it, which this one need not see end before it starts
    gl.warp_specialize(
        [
            (_write, ((initial_state, final_state), tiles, kept, barriers, work, HV, K, V)),
            (_read, (o, scales, tiles, kept, o_s, barriers, work, HV, V, 0)),
            (_read, (o, scales, tiles, kept, o_s, barriers, work, HV, V, 1)),
            (_load, (tensors, tiles, full, empty, work, H, HV, V)),
        ],
        [4, 4, 1],
        [TO_READ, TO_READ, TO_LOAD],
    )


def _prepared(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, o: Tensor
) -> Callable[[int, int, Tensor | None, Tensor | None], None]:  # fmt: skip
    """Starts the kernel on the chunks ``since`` to ``until`` of every sequence, from one state to another."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    items = table.segments * HV * triton.cdiv(V, NARROW)
    programs = min(items, chip_of(q).multiprocessors)
    tensors = (
        heads(q, BK), heads(k, BK), heads(v, NARROW), rows_of(x.T, CHUNK), rows_of(x.c_sum, 1),
        rows_of(x.from_start, 1), rows_of(x.to_end, 1), heads(o, NARROW),
    )  # fmt: skip

    def run(since: int, until: int, initial_state: Tensor | None, final_state: Tensor | None) -> None:
        hopper_narrow_scan_kernel[(programs,)](
            *tensors, initial_state, final_state, scale, math.log2(scale / STRETCH), T,
            table.segment or until - since, since, until, items, programs, H=H, HV=HV, K=K, V=V, STAGES=STAGES,
            TO_READ=REGISTERS_TO_READ, TO_LOAD=REGISTERS_TO_LOAD, num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
        )  # fmt: skip

    return run


def narrow_scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """What ``chunk_forward.scan`` does, for calls that ``hopper.serves`` takes; ``x`` is ``invert``'s."""
    run = _prepared(x, q, k, v, scale, table, o)
    run(0, triton.cdiv(q.shape[1], CHUNK), initial_state, final_state)


def narrow_scan_by_parts(
    parts: Sequence[int], q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """The inverse and the scan of whole sequences, whose ``parts`` have so many chunks: the inverse of a part runs on
    the multiprocessors that the scan of the part before it leaves free."""
    x, invert_part = inverse_by_parts(k, g, beta, table)
    scaled = squares(k, v.shape[2], 0, sum(parts))
    run = _prepared(x._replace(T=scaled.x), q, k, v, scale, table, o)
    between = q.new_empty((table.sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    since = 0
    invert_part(chunks_between(0, parts[0]), scaled)
    for part, ahead in zip(parts, [*parts[1:], 0]):
        until = since + part
        run(since, until, initial_state if since == 0 else between, between if ahead else final_state)
        if ahead:
            invert_part(chunks_between(until, until + ahead), scaled, early=True)
        since = until
