"""The maps of segments on Hopper: what ``map_kernel`` of ``kernels/triton/segments.py`` does, with a scan's roles.

Of the narrow scan's program only what goes from state to state is left: a loader, one warp, and a writer, one warpgroup
with 64 columns::

    W^T = V^T T^T                                       a chunk ahead
    V'^T = W^T - (exp(c) * (S^T K^T)) T^T
    S^T <- exp(c_C) S^T + (exp(c_C - c) * V'^T) K

A program has columns of ``B [K, V]``, which start from zero (from the sequence's own state in its first segment), or of
``M [K, K]``, which start from the identity and whose values are zero. Two of them share a multiprocessor, and none is
started for what nothing needs.
"""

from __future__ import annotations

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
from triton.language.extra.cuda import gdc_wait

from gdn_ops.kernels.hopper import NARROW
from gdn_ops.kernels.hopper.tiles import (
    ALONG_C,
    BK,
    LEFT_C,
    LEFT_K,
    OF_C,
    OF_K,
    heads,
    last_of,
    matrices,
    next_stage,
    rows_of,
    state_tile,
    transformed,
)
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import IntraChunk
from gdn_ops.kernels.triton.segments import Maps

STAGES = 3
# Two programs of two warpgroups, one of them for the loader; the writer has what it leaves.
REGISTERS, REGISTERS_TO_LOAD = 128, 24


@gluon.jit
def _load(tensors, tiles, full, empty, place, H: gl.constexpr, HV: gl.constexpr):
    k, v, transition, from_start, to_end = tensors
    k_s, v_s, t_s, g_s, d_s = tiles
    b, hv, columns, first, chunks, NT, _segment, of_key = place
    C: gl.constexpr = k.block_type.shape[2]
    STAGES: gl.constexpr = k_s.shape[0]
    BYTES: gl.constexpr = (
        k.block_type.nbytes + transition.block_type.nbytes + from_start.block_type.nbytes + to_end.block_type.nbytes
    )
    stage = 0
    phase = 1  # a barrier begins with the phase before its first one complete
    row = (b * NT + first) * HV + hv
    token = first * C
    for _ in range(chunks):
        mbarrier.wait(empty.index(stage), phase)
        ready = full.index(stage)
        if of_key:
            mbarrier.expect(ready, BYTES)
        else:
            mbarrier.expect(ready, BYTES + v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [b, hv, token, columns], ready, v_s.index(stage))
        tma.async_copy_global_to_shared(k, [b, hv // (HV // H), token, 0], ready, k_s.index(stage))
        tma.async_copy_global_to_shared(transition, [row * C, 0], ready, t_s.index(stage))
        tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(stage))
        tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(stage))
        row += HV
        token += C
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _write(enter, M, B, tiles, full, empty, place, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr):
    k_s, v_s, t_s, g_s, d_s = tiles
    b, hv, columns, first, chunks, _NT, segment, of_key = place
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype

    in_v = columns + gl.arange(0, BV, gl.SliceLayout(1, OF_K))
    in_k = gl.arange(0, BK, gl.SliceLayout(0, OF_K))
    S_vk = gl.where((in_v[:, None] == in_k[None, :]) & of_key, 1.0, 0.0)
    if enter is not None:
        offsets, mask = state_tile(columns, K, V, BK, BV)
        starts = (first == 0) & (of_key == 0)
        S_vk += gl.load(enter + (b * HV + hv).to(gl.int64) * (K * V) + offsets, mask=mask & starts, other=0.0)
    if of_key:
        by_16: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 4, 8], [1, 1, 4, 1], [3, 2, 1, 0])
        for i in gl.static_range(STAGES):
            v_s.index(i).store(gl.zeros([1, 1, C, BV], dtype, by_16))
        fence_async_shared()

    none = gl.zeros([BV, C], gl.float32, OF_C)
    stage = 0
    phase = 0
    last = 0
    mbarrier.wait(full.index(0), 0)
    w_vc = transformed(v_s, t_s, 0)
    S_vk = warpgroup_mma_wait(1, deps=(S_vk,))  # as at the loop's end, or ptxas waits in it
    for i in range(chunks):
        k_ck = k_s.index(stage).reshape([C, BK])
        t_jc = t_s.index(stage).permute((1, 0))
        low_vk = gl.convert_layout(S_vk.to(dtype), LEFT_C)
        stored_vc = warpgroup_mma(low_vk, k_ck.permute((1, 0)), none, use_acc=False, is_async=True)
        grown_c = g_s.index(stage).reshape([C]).load(ALONG_C)
        decay_c = d_s.index(stage).reshape([C]).load(ALONG_C)
        whole = last_of(g_s.index(stage))
        mbarrier.arrive(empty.index(last), count=1, pred=i > 0)  # here it holds up nothing
        S_vk = S_vk * whole
        stored_vc, w_vc = warpgroup_mma_wait(0, deps=(stored_vc, w_vc))
        erased_vc = gl.convert_layout((stored_vc * -grown_c[None, :]).to(dtype), LEFT_C)
        new_vc = warpgroup_mma(erased_vc, t_jc, w_vc, is_async=True)
        new_vc = warpgroup_mma_wait(0, deps=(new_vc,))
        decayed_vc = gl.convert_layout((new_vc * decay_c[None, :]).to(dtype), LEFT_K)
        S_vk = warpgroup_mma(decayed_vc, k_ck, S_vk, is_async=True)
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase, pred=i + 1 < chunks)
        w_vc = transformed(v_s, t_s, stage)
        S_vk = warpgroup_mma_wait(1, deps=(S_vk,))
    warpgroup_mma_wait(0, deps=(w_vc,))

    at = (segment * HV + hv).to(gl.int64)
    if of_key:  # in two terms, by way of tiles that nothing needs any more
        three: gl.constexpr = M.layout
        rest_vk = S_vk
        for term in gl.static_range(2):
            tile = k_s.index(term)._reinterpret(gl.bfloat16, [1, BK, BV], three)
            term_vk = rest_vk.to(gl.bfloat16)
            tile.reshape([BK, BV]).permute((1, 0)).store(term_vk)
            rest_vk -= term_vk.to(gl.float32)
            fence_async_shared()
            tma.async_copy_shared_to_global(M, [(2 * at + term).to(gl.int32), 0, columns], tile)
        tma.store_wait(0)
    else:
        offsets, mask = state_tile(columns, K, V, BK, BV)
        gl.store(B + at * (K * V) + offsets, S_vk, mask=mask)


@gluon.jit
def hopper_map_kernel(
    k,
    v,
    transition,
    from_start,
    to_end,
    enter,
    M,
    B,
    T,
    SEGMENT,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    TO_LOAD: gl.constexpr,
):
    """``enter`` may be None."""
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    NK: gl.constexpr = (K + BV - 1) // BV
    NV: gl.constexpr = (V + BV - 1) // BV
    dtype: gl.constexpr = k.dtype
    program = gl.program_id(0)
    NT = (T + C - 1) // C
    parts = (NT + SEGMENT - 1) // SEGMENT
    of_values = (parts - 1) * NV
    hv = program % HV
    tiles_each = of_values + (parts - 2) * NK
    b = program // HV // tiles_each
    tile = program // HV % tiles_each
    of_key = tile >= of_values
    part = gl.where(of_key, 1 + (tile - of_values) // NK, tile // NV)
    columns = gl.where(of_key, (tile - of_values) % NK, tile % NV) * BV

    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES] + v.block_type.shape, v.layout)
    t_s = gl.allocate_shared_memory(dtype, [STAGES] + transition.block_type.shape, transition.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [STAGES] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [STAGES] + to_end.block_type.shape, to_end.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()

    tensors = (k, v, transition, from_start, to_end)
    tiles = (k_s, v_s, t_s, g_s, d_s)
    place = (b, hv, columns, part * SEGMENT, SEGMENT, NT, b * parts + part, of_key)
    gdc_wait()  # for the kernel before it, which this one need not see end before it starts
    gl.warp_specialize(
        [
            (_write, (enter, M, B, tiles, full, empty, place, HV, K, V)),
            (_load, (tensors, tiles, full, empty, place, H, HV)),
        ],
        [1],
        [TO_LOAD],
    )


def maps(x: IntraChunk, k: Tensor, v: Tensor, table: ChunkTable, enter: Tensor | None) -> Maps:
    """What ``segments.maps`` does, for calls that ``hopper.serves`` takes; ``x`` is ``invert``'s."""
    T, H, K = k.shape[1:]
    HV, V = v.shape[2:]
    M = torch.empty((table.segments, HV, 2, K, K), dtype=torch.bfloat16, device=k.device)
    B = torch.empty((table.segments, HV, K, V), dtype=torch.float32, device=k.device)
    parts = table.segments // table.sequences
    tiles = (parts - 1) * triton.cdiv(V, NARROW) + (parts - 2) * triton.cdiv(K, NARROW)
    hopper_map_kernel[(table.sequences * HV * tiles,)](
        heads(k, BK), heads(v, NARROW), rows_of(x.T, CHUNK), rows_of(x.from_start, 1), rows_of(x.to_end, 1), enter,
        matrices(M.flatten(0, 1), BK, NARROW), B, T, table.segment, H=H, HV=HV, K=K, V=V, STAGES=STAGES,
        TO_LOAD=REGISTERS_TO_LOAD, num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return Maps(M, B)
