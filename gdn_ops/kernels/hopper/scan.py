"""The scan of the forward on Hopper, scores included: the arithmetic of ``kernels/triton/chunk_forward.py``.

Why another one: Triton waits for every product of the scan where it is issued, starts each load by instructions of
the warps that compute, and needs ``P`` from a kernel of its own, which reads q and k again and writes half as much as
``v`` holds. Here a program has four roles:

- **a loader**, one warp, keeps ``STAGES`` chunks of tiles in flight by the copy engine (TMA): q, k, v, ``T``, the
  decays. A mbarrier says that a chunk is there, another that it may be overwritten.
- **a warpgroup** leaves the scores ``P = scale (Q K^T) * D`` in shared memory, a chunk or two ahead.
- **two warpgroups**, each with ``BV = 64`` columns of values and its part of the state, transposed as in the portable
  scan. They share what is loaded and wait for nothing of each other, so that one rounds what its product left in
  registers while the tensor cores work for the other::

      S^T K^T and S^T Q^T                                 the one is rounded while the other runs
      V'^T = V^T T^T - (exp(c) * (S^T K^T)) T^T           while it runs, the state is scaled by exp(c_C)
      S^T <- exp(c_C) S^T + (exp(c_C - c) * V'^T) K
      O^T = scale * exp(c) * (S^T Q^T) + V'^T P^T

Outputs pass shared memory once more, transposed on the way, and leave by the copy engine, which leaves out what is past
the end of the sequence. What was tried on the way is in docs/kernels.md.

Roles by warp are those of FlashInfer's and FlashQLA's kernels.
"""

from __future__ import annotations

import math

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

from gdn_ops.kernels.hopper.tiles import (
    ALONG_C,
    BK,
    BV,
    LEFT_C,
    LEFT_K,
    OF_C,
    OF_K,
    decays,
    heads,
    keep_scores,
    last_of,
    likeness,
    next_stage,
    piece_of,
    rows_of,
    scores,
    state_tile,
)
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import STRETCH, IntraChunk

STAGES = 3
# Of four warpgroups, one of them for the loader; those that compute have what the others leave.
REGISTERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_SCORE, REGISTERS_TO_LOAD = 128, 216, 56, 24


@gluon.jit
def _load(tensors, tiles, full, empty, b, begin, h, hv, v0, chunk, chunks, HV: gl.constexpr):
    q, k, v, transition, sums, from_start, to_end = tensors
    q_s, k_s, v_s, t_s, c_s, g_s, d_s = tiles
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    STAGES: gl.constexpr = k_s.shape[0]
    BYTES: gl.constexpr = (
        q.block_type.nbytes
        + k.block_type.nbytes
        + 2 * v.block_type.nbytes
        + transition.block_type.nbytes
        + sums.block_type.nbytes
        + from_start.block_type.nbytes
        + to_end.block_type.nbytes
    )
    stage = 0
    phase = 1  # a barrier begins with the phase before its first one complete
    row = chunk * HV + hv
    token = begin
    for _ in range(chunks):
        mbarrier.wait(empty.index(stage), phase)
        ready = full.index(stage)
        mbarrier.expect(ready, BYTES)
        tma.async_copy_global_to_shared(k, [b, h, token, 0], ready, k_s.index(stage))
        tma.async_copy_global_to_shared(q, [b, h, token, 0], ready, q_s.index(stage))
        tma.async_copy_global_to_shared(sums, [row, 0], ready, c_s.index(stage))
        tma.async_copy_global_to_shared(transition, [row * C, 0], ready, t_s.index(stage))
        tma.async_copy_global_to_shared(v, [b, hv, token, v0], ready, v_s.index(2 * stage))
        tma.async_copy_global_to_shared(v, [b, hv, token, v0 + BV], ready, v_s.index(2 * stage + 1))
        tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(stage))
        tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(stage))
        row += HV
        token += C
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _score(tiles, p_s, full, empty, scored, score_scale, chunks):
    """``P`` of every chunk, half after half for want of registers, as soon as that of the one before the last has been
    used."""
    q_s, k_s, _, _, c_s, _, _ = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    dtype: gl.constexpr = k_s.dtype
    stage = 0
    phase = 0
    for i in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        # The stage of the chunk before the last is the one that comes next.
        ahead, phase_ahead = next_stage(stage, phase, STAGES)
        for part in gl.static_range(2):
            qk_cj = likeness(q_s, k_s, stage, 2, part)
            D_cj = decays(c_s, stage, score_scale, C, 2, part)
            qk_cj = warpgroup_mma_wait(0, deps=(qk_cj,))
            P_cj = scores(qk_cj, D_cj, part, dtype)
            if part == 0:
                mbarrier.wait(empty.index(ahead), phase_ahead ^ 1)
            keep_scores(P_cj, p_s.index(i & 1), part)
        mbarrier.arrive(scored.index(i & 1), count=1)
        stage = ahead
        phase = phase_ahead


@gluon.jit
def _compute(
    o,
    states,
    scale,
    place,
    tiles,
    p_s,
    o_s,
    full,
    empty,
    scored,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    part: gl.constexpr,
):
    initial_state, final_state = states
    b, begin, hv, v0, segment, last, chunks = place
    q_s, k_s, v_s, t_s, _, g_s, d_s = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype

    v0 += part * BV
    none_c = gl.zeros([BV, C], gl.float32, OF_C)
    o_tile = o_s.index(part)
    if initial_state is None:
        S_vk = gl.zeros([BV, BK], gl.float32, OF_K)
    else:
        at = initial_state + (segment * HV + hv).to(gl.int64) * (K * V)
        offsets, mask = state_tile(v0, K, V, BK, BV)
        S_vk = gl.load(at + offsets, mask=mask, other=0.0).to(gl.float32)
    stage = 0
    phase = 0
    for i in range(chunks):
        q_ck = q_s.index(stage).reshape([C, BK])
        k_ck = k_s.index(stage).reshape([C, BK])
        v_cv = v_s.index(2 * stage + part).reshape([C, BV])
        t_jc = t_s.index(stage).permute((1, 0))
        S_low = gl.convert_layout(S_vk.to(dtype), LEFT_C)
        mbarrier.wait(full.index(stage), phase)
        stored_vc = warpgroup_mma(S_low, k_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        read_vc = warpgroup_mma(S_low, q_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        whole = last_of(g_s.index(stage))
        grown_c = g_s.index(stage).reshape([C]).load(ALONG_C)
        stored_vc = warpgroup_mma_wait(1, deps=(stored_vc,))
        erased_vc = gl.convert_layout((stored_vc * -grown_c[None, :]).to(dtype), LEFT_C)
        read_vc, S_vk = warpgroup_mma_wait(0, deps=(read_vc, S_vk))
        w_vc = warpgroup_mma(v_cv.permute((1, 0)), t_jc, none_c, use_acc=False, is_async=True)
        new_vc = warpgroup_mma(erased_vc, t_jc, w_vc, is_async=True)
        # While products run, ptxas lets only what has just been waited for be changed.
        read_vc = read_vc * (grown_c * scale)[None, :]
        S_vk = S_vk * whole
        new_vc = warpgroup_mma_wait(0, deps=(new_vc,))
        decay_c = d_s.index(stage).reshape([C]).load(ALONG_C)
        decayed_vc = gl.convert_layout((new_vc * decay_c[None, :]).to(dtype), LEFT_K)
        S_vk = warpgroup_mma(decayed_vc, k_ck, S_vk, is_async=True)
        new_low = gl.convert_layout(new_vc.to(dtype), LEFT_C)
        mbarrier.wait(scored.index(i & 1), i >> 1 & 1)
        o_vc = warpgroup_mma(new_low, p_s.index(i & 1).permute((1, 0)), read_vc, is_async=True)
        tma.store_wait(0)
        o_vc, S_vk = warpgroup_mma_wait(0, deps=(o_vc, S_vk))
        mbarrier.arrive(empty.index(stage), count=1)
        o_tile.reshape([C, BV]).permute((1, 0)).store(o_vc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [b, hv, begin + i * C, v0], o_tile)
        stage, phase = next_stage(stage, phase, STAGES)
    if final_state is not None:  # noqa: SIM102, decided when it is compiled
        if last:
            at = final_state + (b * HV + hv).to(gl.int64) * (K * V)
            offsets, mask = state_tile(v0, K, V, BK, BV)
            gl.store(at + offsets, S_vk, mask=mask)
    tma.store_wait(0)


@gluon.jit
def hopper_scan_kernel(
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
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    TO_COMPUTE: gl.constexpr,
    TO_SCORE: gl.constexpr,
    TO_LOAD: gl.constexpr,
):
    """``SEGMENT`` chunks a segment; ``initial_state`` is a segment's, ``final_state`` a sequence's; both may be None.
    ``score_scale`` is a logarithm to base 2."""
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    b, hv, v0, first, chunks, segment, NT = piece_of(gl.program_id(0), T, SEGMENT, HV, V, C, 2 * BV)
    last = first + chunks == NT

    dtype: gl.constexpr = k.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q.block_type.shape, q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * STAGES] + v.block_type.shape, v.layout)
    t_s = gl.allocate_shared_memory(dtype, [STAGES] + transition.block_type.shape, transition.layout)
    c_s = gl.allocate_shared_memory(gl.float32, [STAGES] + sums.block_type.shape, sums.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [STAGES] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [STAGES] + to_end.block_type.shape, to_end.layout)
    p_s = gl.allocate_shared_memory(dtype, [2] + transition.block_type.shape, transition.layout)
    o_s = gl.allocate_shared_memory(dtype, [2] + o.block_type.shape, o.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=1)
    fence_async_shared()

    tensors = (q, k, v, transition, sums, from_start, to_end)
    tiles = (q_s, k_s, v_s, t_s, c_s, g_s, d_s)
    states = (initial_state, final_state)
    place = (b, first * C, hv, v0, segment, last, chunks)
    gl.warp_specialize(
        [
            (_compute, (o, states, scale, place, tiles, p_s, o_s, full, empty, scored, HV, K, V, 0)),
            (_compute, (o, states, scale, place, tiles, p_s, o_s, full, empty, scored, HV, K, V, 1)),
            (_score, (tiles, p_s, full, empty, scored, score_scale, chunks)),
            (_load, (tensors, tiles, full, empty, b, first * C, hv // (HV // H), hv, v0, b * NT + first, chunks, HV)),
        ],
        [4, 4, 1],
        [TO_COMPUTE, TO_SCORE, TO_LOAD],
    )


def scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """What ``chunk_forward.scan`` does, for calls that ``hopper.serves`` takes; ``x`` is ``invert``'s."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    segment = table.segment or triton.cdiv(T, CHUNK)
    hopper_scan_kernel[(table.segments * HV * triton.cdiv(V, 2 * BV),)](
        heads(q, BK), heads(k, BK), heads(v, BV), rows_of(x.T, CHUNK), rows_of(x.c_sum, 1), rows_of(x.from_start, 1),
        rows_of(x.to_end, 1), heads(o, BV), initial_state, final_state, scale, math.log2(scale / STRETCH), T, segment,
        H=H, HV=HV, K=K, V=V, STAGES=STAGES, TO_COMPUTE=REGISTERS_TO_COMPUTE,
        TO_SCORE=REGISTERS_TO_SCORE, TO_LOAD=REGISTERS_TO_LOAD, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
