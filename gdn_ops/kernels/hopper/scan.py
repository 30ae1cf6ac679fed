"""The scan of the forward on Hopper, scores included: the arithmetic of ``kernels/triton/chunk_forward.py``.

Why another one: Triton waits for every product of the scan where it is issued, starts each load by instructions of
the warps that compute, and needs ``P`` from a kernel of its own, which reads q and k again and writes half as much as
``v`` holds. Here a program has three roles:

- **a loader**, one warp, keeps ``STAGES`` chunks of tiles in flight by the copy engine (TMA): q, k, v, ``T``, the
  decays. A mbarrier says that a chunk is there, another that it may be overwritten.
- **two warpgroups**, each with ``BV = 64`` columns of values and its part of the state, transposed as in the portable
  scan. They share what is loaded; while one rounds what its product left in registers, the tensor cores work for the
  other. Each computes half of the scores, 32 columns of ``P = scale (Q K^T) * D``, and leaves it in shared memory::

      W^T = V^T T^T                                       nothing of it waits for the state
      V'^T = W^T - (exp(c) * (S^T K^T)) T^T
      S^T <- exp(c_C) S^T + (exp(c_C - c) * V'^T) K       while it runs: O^T = scale * exp(c) * (S^T Q^T) + V'^T P^T

Outputs pass shared memory once more, transposed on the way, and leave by the copy engine, which leaves out what is past
the end of the sequence. ``D = exp(c_i - c_j)`` comes from sums in two fp32 terms and in units of log2: differences of
fp64 are slow. What was tried on the way is in docs/kernels.md.

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import STRETCH, IntraChunk

BK = 128
BV = 64  # columns of a warpgroup; a program has two
STAGES = 3
# Three warpgroups, one of them for the loader: ptxas plans with the mean, and the roles take what they need.
REGISTERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_LOAD = 168, 240, 24


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _last_of(row, layout: gl.constexpr, C: gl.constexpr):
    """The last number of a row in shared memory. A load from memory would be waited for at the next fence."""
    return gl.sum(row.reshape([C]).slice(C - 1, 1).load(layout), 0)


@gluon.jit
def _state_tile(first, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, layout: gl.constexpr):
    """Offsets in a state ``[K, V]`` of a tile ``[BV, BK]``, and what of it exists. Where ``first`` comes from is hidden
    from the compiler, which would keep the tile in registers from one use to the next."""
    first = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [first], dtype=gl.int32, is_pure=False, pack=1)
    in_v = first + gl.arange(0, BV, gl.SliceLayout(1, layout))
    in_k = gl.arange(0, BK, gl.SliceLayout(0, layout))
    return in_k[None, :] * V + in_v[:, None], (in_v < V)[:, None] & (in_k < K)[None, :]


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
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _compute(
    o,
    states,
    scales,
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
    scale, score_scale = scales
    b, begin, hv, v0, segment, last, chunks = place
    q_s, k_s, v_s, t_s, c_s, g_s, d_s = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    HALF: gl.constexpr = C // 2
    dtype: gl.constexpr = k_s.dtype
    of_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    of_c: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    of_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    left_c: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_c, k_width=2)
    left_k: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_k, k_width=2)
    along_c: gl.constexpr = gl.SliceLayout(0, of_c)
    along_i: gl.constexpr = gl.SliceLayout(1, of_p)
    along_j: gl.constexpr = gl.SliceLayout(0, of_p)

    v0 += part * BV
    lower = gl.arange(0, C, along_i)[:, None] >= part * HALF + gl.arange(0, HALF, along_j)[None, :]
    none_c = gl.zeros([BV, C], gl.float32, of_c)
    none_p = gl.zeros([C, HALF], gl.float32, of_p)
    o_tile = o_s.index(part)
    if initial_state is None:
        S_vk = gl.zeros([BV, BK], gl.float32, of_k)
    else:
        at = initial_state + (segment * HV + hv).to(gl.int64) * (K * V)
        offsets, mask = _state_tile(v0, K, V, BK, BV, of_k)
        S_vk = gl.load(at + offsets, mask=mask, other=0.0).to(gl.float32)
    S_low = gl.convert_layout(S_vk.to(dtype), left_c)
    mbarrier.wait(full.index(0), 0)
    S_vk = S_vk * _last_of(g_s.index(0), along_c, C)
    stage = 0
    phase = 0
    for i in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        q_ck = q_s.index(stage).reshape([C, BK])
        k_ck = k_s.index(stage).reshape([C, BK])
        v_cv = v_s.index(2 * stage + part).reshape([C, BV])
        t_jc = t_s.index(stage).permute((1, 0))
        p_cc = p_s.index(i & 1)
        k_kj = k_ck.slice(part * HALF, HALF).permute((1, 0))
        qk_cj = warpgroup_mma(q_ck, k_kj, none_p, use_acc=False, is_async=True)
        stored_vc = warpgroup_mma(S_low, k_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        w_vc = warpgroup_mma(v_cv.permute((1, 0)), t_jc, none_c, use_acc=False, is_async=True)

        # Whoever arrives two chunks later has seen both warpgroups arrive one chunk later, and so be done with this P.
        sums = c_s.index(stage).reshape([2 * C])
        high_i = sums.slice(0, C).load(along_i)
        low_i = sums.slice(C, C).load(along_i) + score_scale
        high_j = sums.slice(part * HALF, HALF).load(along_j)
        low_j = sums.slice(C + part * HALF, HALF).load(along_j)
        D_cj = _exp2((high_i[:, None] - high_j[None, :]) + (low_i[:, None] - low_j[None, :]))
        qk_cj = warpgroup_mma_wait(2, deps=(qk_cj,))
        p_cc.slice(part * HALF, HALF, 1).store(gl.where(lower, qk_cj * D_cj, 0.0).to(dtype))
        fence_async_shared()
        mbarrier.arrive(scored.index(i & 1), count=1)

        grown_c = g_s.index(stage).reshape([C]).load(along_c)
        stored_vc, w_vc = warpgroup_mma_wait(0, deps=(stored_vc, w_vc))
        erased_vc = gl.convert_layout((stored_vc * -grown_c[None, :]).to(dtype), left_c)
        new_vc = warpgroup_mma(erased_vc, t_jc, w_vc, is_async=True)
        read_vc = warpgroup_mma(S_low, q_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        decay_c = d_s.index(stage).reshape([C]).load(along_c)
        new_vc = warpgroup_mma_wait(1, deps=(new_vc,))
        decayed_vc = gl.convert_layout((new_vc * decay_c[None, :]).to(dtype), left_k)
        new_low = gl.convert_layout(new_vc.to(dtype), left_c)
        S_vk = warpgroup_mma(decayed_vc, k_ck, S_vk, is_async=True)
        mbarrier.wait(scored.index(i & 1), i >> 1 & 1)
        read_vc = warpgroup_mma_wait(1, deps=(read_vc,))
        read_vc = read_vc * (grown_c * scale)[None, :]
        o_vc = warpgroup_mma(new_low, p_cc.permute((1, 0)), read_vc, is_async=True)

        # The state is scaled for the next chunk here, before that chunk's first product is issued: ptxas waits for all
        # products where it cannot tell which of them made a register.
        more = i + 1 < chunks
        ahead, phase_ahead = _next(stage, phase, STAGES)
        mbarrier.wait(full.index(ahead), phase_ahead, pred=more)
        whole = gl.where(more, _last_of(g_s.index(ahead), along_c, C), 1.0)
        S_vk = warpgroup_mma_wait(1, deps=(S_vk,))
        S_low = gl.convert_layout(S_vk.to(dtype), left_c)
        S_vk = S_vk * whole
        tma.store_wait(0)
        o_vc, S_vk = warpgroup_mma_wait(0, deps=(o_vc, S_vk))
        mbarrier.arrive(empty.index(stage), count=1)
        o_tile.reshape([C, BV]).permute((1, 0)).store(o_vc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [b, hv, begin + i * C, v0], o_tile)
        stage = ahead
        phase = phase_ahead
    if final_state is not None:  # noqa: SIM102, decided when it is compiled
        if last:
            at = final_state + (b * HV + hv).to(gl.int64) * (K * V)
            offsets, mask = _state_tile(v0, K, V, BK, BV, of_k)
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
    TO_LOAD: gl.constexpr,
):
    """``SEGMENT`` chunks a segment; ``initial_state`` is a segment's, ``final_state`` a sequence's; both may be None.
    ``score_scale`` is a logarithm to base 2."""
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    NV: gl.constexpr = (V + 2 * BV - 1) // (2 * BV)
    program = gl.program_id(0)
    v0 = program % NV * (2 * BV)
    hv = program // NV % HV
    segment = program // (NV * HV)
    NT = (T + C - 1) // C
    parts = (NT + SEGMENT - 1) // SEGMENT
    b = segment // parts
    first = segment % parts * SEGMENT
    chunks = gl.minimum(SEGMENT, NT - first)
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
        mbarrier.init(scored.index(i), count=2)
    fence_async_shared()

    tensors = (q, k, v, transition, sums, from_start, to_end)
    tiles = (q_s, k_s, v_s, t_s, c_s, g_s, d_s)
    states = (initial_state, final_state)
    scales = (scale, score_scale)
    place = (b, first * C, hv, v0, segment, last, chunks)
    gl.warp_specialize(
        [
            (_compute, (o, states, scales, place, tiles, p_s, o_s, full, empty, scored, HV, K, V, 0)),
            (_compute, (o, states, scales, place, tiles, p_s, o_s, full, empty, scored, HV, K, V, 1)),
            (_load, (tensors, tiles, full, empty, b, first * C, hv // (HV // H), hv, v0, b * NT + first, chunks, HV)),
        ],
        [4, 1],
        [TO_COMPUTE, TO_LOAD],
    )


def _heads(x: Tensor, width: int) -> TensorDescriptor:
    """Tiles of ``CHUNK`` tokens by ``width`` features of ``x [B, T, H, features]``."""
    x = x.transpose(1, 2)
    # The stride of an axis of one is never used, and may be any number.
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride())]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, CHUNK, width], layout)


def _rows(x: Tensor, rows: int) -> TensorDescriptor:
    """``rows`` rows of ``x [..., width]``, which is contiguous."""
    x = x.view(-1, x.shape[-1])
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128 if rows > 1 else 0, element_bitwidth=bits, rank=2)
    return TensorDescriptor(x, list(x.shape), [x.shape[-1], 1], [rows, x.shape[-1]], layout)


def scan(
    x: IntraChunk, q: Tensor, k: Tensor, v: Tensor, scale: float, table: ChunkTable, *,
    o: Tensor, initial_state: Tensor | None, final_state: Tensor | None,
) -> None:  # fmt: skip
    """What ``chunk_forward.scan`` does, for calls that ``hopper.serves`` takes; ``x`` is without scores."""
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    segment = table.segment or triton.cdiv(T, CHUNK)
    hopper_scan_kernel[(table.segments * HV * triton.cdiv(V, 2 * BV),)](
        _heads(q, BK), _heads(k, BK), _heads(v, BV), _rows(x.T, CHUNK), _rows(x.c_sum, 1), _rows(x.from_start, 1),
        _rows(x.to_end, 1), _heads(o, BV), initial_state, final_state, scale, math.log2(scale / STRETCH), T, segment,
        H=H, HV=HV, K=K, V=V, STAGES=STAGES, TO_COMPUTE=REGISTERS_TO_COMPUTE, TO_LOAD=REGISTERS_TO_LOAD,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
