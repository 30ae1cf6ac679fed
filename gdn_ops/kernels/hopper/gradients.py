"""The gradients of the backward on Hopper in one kernel: value_gradient_kernel and key_gradient_kernel of
``kernels/triton/chunk_backward.py`` together, for V = 128.

A program takes (chunk, key head) pairs one after the other. A warp loads tiles of 16 KiB by the copy engine, in the
order in which they are used, into a ring; two warpgroups have 64 columns of keys each. ``dP`` is the first one's,
``dA`` the second's; they pass shared memory, not memory. Row sums of the two are added at the end of a member (a value
head).
"""

from __future__ import annotations

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

from gdn_ops.kernels.hopper.both_ways import _tiles
from gdn_ops.kernels.hopper.scan import _exp2, _heads, _rows
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK
from gdn_ops.kernels.triton.intra_chunk import IntraChunk

SLOTS = 8  # a member's: V', dO, X, v, S, dS, S, dS
SIZE = 128  # K, padded, and V


@gluon.jit
def _ready(full, tile, SLOTS: gl.constexpr):
    mbarrier.wait(full.index(tile % SLOTS), tile // SLOTS & 1)


@gluon.jit
def _load(
    tensors,
    ring,
    q_s,
    k_s,
    vectors,
    full,
    empty,
    qk_full,
    qk_empty,
    items,
    programs,
    NT,
    H: gl.constexpr,
    HV: gl.constexpr,
):
    q, k, v, do, states, dstates, written, X, sums, from_start, to_end, beta = tensors
    c_s, g_s, d_s, b_s = vectors
    SLOTS: gl.constexpr = ring.shape[0]
    C: gl.constexpr = 64
    GROUP: gl.constexpr = HV // H
    NBYTES: gl.constexpr = 16384
    VECTORS: gl.constexpr = 1280
    dtype: gl.constexpr = ring.dtype
    four: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    three: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    tile = 0
    number = 0
    member_number = 0
    for item in range(gl.program_id(0), items, programs):
        chunk = item // H
        h = item % H
        b = chunk // NT
        token = chunk % NT * C
        turn = number & 1
        mbarrier.wait(qk_empty.index(turn), (number >> 1 & 1) ^ 1)
        mbarrier.expect(qk_full.index(turn), 2 * NBYTES)
        tma.async_copy_global_to_shared(k, [b, h, token, 0], qk_full.index(turn), k_s.index(turn))
        tma.async_copy_global_to_shared(q, [b, h, token, 0], qk_full.index(turn), q_s.index(turn))
        for member in range(GROUP):
            hv = h * GROUP + member
            row = chunk * HV + hv
            vector = member_number & 1
            for i in gl.static_range(8):
                slot = tile % SLOTS
                mbarrier.wait(empty.index(slot), (tile // SLOTS & 1) ^ 1)
                ready = full.index(slot)
                at = ring.index(slot)
                columns = at._reinterpret(dtype, [1, 128, 64], three)
                tokens = at._reinterpret(dtype, [1, 1, 64, 128], four)
                values = at._reinterpret(dtype, [1, 64, 128], three)
                mbarrier.expect(ready, NBYTES + VECTORS if i == 0 else NBYTES)
                if i == 0:
                    tma.async_copy_global_to_shared(written, [row, 0, 0], ready, columns)
                    tma.async_copy_global_to_shared(sums, [row, 0], ready, c_s.index(vector))
                    tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(vector))
                    tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(vector))
                    tma.async_copy_global_to_shared(beta, [row, 0], ready, b_s.index(vector))
                elif i == 1:
                    tma.async_copy_global_to_shared(do, [b, hv, token, 0], ready, tokens)
                elif i == 2:
                    tma.async_copy_global_to_shared(X, [b, hv, token, 0], ready, tokens)
                elif i == 3:
                    tma.async_copy_global_to_shared(v, [b, hv, token, 0], ready, tokens)
                elif i % 2 == 0:
                    tma.async_copy_global_to_shared(states, [row, (i - 4) // 2 * 64, 0], ready, values)
                else:
                    tma.async_copy_global_to_shared(dstates, [row, (i - 4) // 2 * 64, 0], ready, values)
                tile += 1
            member_number += 1
        number += 1  # noqa: SIM113, Gluon has no enumerate


@gluon.jit
def _compute(
    outs,
    gates,
    tiles,
    squares,
    vectors,
    sums_s,
    barriers,
    meet,
    counts,
    scale,
    T,
    NT,
    H: gl.constexpr,
    HV: gl.constexpr,
    part: gl.constexpr,
):
    dq, dk, dv = outs
    dg, dbeta = gates
    ring, q_s, k_s = tiles
    full, empty, qk_full, qk_empty = barriers
    items, programs = counts
    p_s, a_s, ab_s = squares
    c_s, g_s, d_s, b_s = vectors
    SLOTS: gl.constexpr = ring.shape[0]
    C: gl.constexpr = 64
    GROUP: gl.constexpr = HV // H
    dtype: gl.constexpr = ring.dtype
    two: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    four: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    of_c: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    row_c: gl.constexpr = gl.SliceLayout(1, of_c)
    col_c: gl.constexpr = gl.SliceLayout(0, of_c)
    rows = gl.arange(0, C, row_c)
    columns = gl.arange(0, C, col_c)
    none = gl.zeros([C, 64], gl.float32, of_c)
    exchanged = meet.index(0)
    summed = meet.index(1)
    ended_all = meet.index(2)
    tile = 0
    number = 0
    member_number = 0
    for item in range(gl.program_id(0), items, programs):
        chunk = item // H
        h = item % H
        b = chunk // NT
        token = chunk % NT * C
        real = rows < T - token
        turn = number & 1
        q_j = q_s.index(turn).reshape([C, 128]).slice(part * 64, 64, 1)
        k_j = k_s.index(turn).reshape([C, 128]).slice(part * 64, 64, 1)
        mbarrier.wait(qk_full.index(turn), number >> 1 & 1)
        dq_ck = gl.zeros([C, 64], gl.float32, of_c)
        dk_ck = gl.zeros([C, 64], gl.float32, of_c)
        for member in range(GROUP):
            hv = h * GROUP + member
            vector = member_number & 1
            phase = member_number & 1
            n_vc = ring.index(tile % SLOTS)._reinterpret(dtype, [128, 64], two)
            do_cv = ring.index((tile + 1) % SLOTS)
            x_cv = ring.index((tile + 2) % SLOTS)
            v_cv = ring.index((tile + 3) % SLOTS)
            _ready(full, tile, SLOTS)
            if part == 0:
                _ready(full, tile + 1, SLOTS)
                square = warpgroup_mma(do_cv, n_vc, none, use_acc=False, is_async=True)
                _ready(full, tile + 2, SLOTS)
            else:
                _ready(full, tile + 2, SLOTS)
                square = warpgroup_mma(x_cv, n_vc, none, use_acc=False, is_async=True)
                _ready(full, tile + 1, SLOTS)
            beta_c = b_s.index(vector).reshape([C]).load(row_c)
            sums = c_s.index(vector).reshape([2 * C])
            high = sums.slice(0, C)
            low = sums.slice(C, C)
            _ready(full, tile + 3, SLOTS)
            v_half = v_cv.slice(part * 64, 64, 1)
            x_half = x_cv.slice(part * 64, 64, 1).load(of_c).to(gl.float32)
            of_value = gl.sum(x_half * v_half.load(of_c).to(gl.float32), 1)
            D_cc = _exp2(
                (high.load(row_c)[:, None] - high.load(col_c)[None, :])
                + (low.load(row_c)[:, None] - low.load(col_c)[None, :])
            )
            v_half.store((x_half * beta_c[:, None]).to(dtype))
            square = warpgroup_mma_wait(0, deps=(square,))
            if part == 0:
                p_s.store(gl.where(rows[:, None] >= columns[None, :], square * D_cc * scale, 0.0).to(dtype))
            else:
                a_cc = gl.where(rows[:, None] > columns[None, :], square * D_cc, 0.0)
                a_s.store(a_cc.to(dtype))
                ab_s.store((a_cc * -beta_c[:, None]).to(dtype))
            fence_async_shared()
            mbarrier.arrive(exchanged, count=1)

            toward_q = none
            toward_k = none
            r_ck = none
            trace = gl.zeros([C], gl.float32, row_c)
            for piece in gl.static_range(2):
                at = tile + 4 + 2 * piece
                _ready(full, at, SLOTS)
                s_vk = ring.index(at % SLOTS).slice(part * 64, 64, 1)
                toward_q = warpgroup_mma(
                    do_cv.slice(piece * 64, 64, 1), s_vk, toward_q, use_acc=piece > 0, is_async=True
                )
                r_ck = warpgroup_mma(x_cv.slice(piece * 64, 64, 1), s_vk, r_ck, use_acc=piece > 0, is_async=True)
                _ready(full, at + 1, SLOTS)
                ds_vk = ring.index((at + 1) % SLOTS).slice(part * 64, 64, 1)
                toward_k = warpgroup_mma(
                    n_vc.slice(piece * 64, 64).permute((1, 0)), ds_vk, toward_k, use_acc=piece > 0, is_async=True
                )
                product = s_vk.load(of_c).to(gl.float32) * ds_vk.load(of_c).to(gl.float32)
                trace += gl.sum(product, 1)
                toward_q, r_ck, toward_k = warpgroup_mma_wait(0, deps=(toward_q, r_ck, toward_k))
                mbarrier.arrive(empty.index(at % SLOTS), count=1)
                mbarrier.arrive(empty.index((at + 1) % SLOTS), count=1)
            for i in gl.static_range(3):
                mbarrier.arrive(empty.index((tile + i) % SLOTS), count=1)
            mbarrier.wait(exchanged, phase)
            if part == 1:
                tma.async_copy_shared_to_global(dv, [b, hv, token, 0], v_cv._reinterpret(dtype, [1, 1, 64, 128], four))
            grown_c = g_s.index(vector).reshape([C]).load(row_c)
            decay_c = d_s.index(vector).reshape([C]).load(row_c)
            whole = gl.sum(g_s.index(vector).reshape([C]).slice(C - 1, 1).load(row_c), 0)
            k_ck = k_j.load(of_c).to(gl.float32)
            toward_q = toward_q * (grown_c * scale)[:, None]
            toward_k = toward_k * decay_c[:, None]
            ended = gl.sum(toward_k * k_ck, 1) + trace * whole  # all of it is summed, whatever the row
            r_ck = r_ck * grown_c[:, None]
            toward_q = warpgroup_mma(p_s, k_j, toward_q, is_async=True)
            r_ck = warpgroup_mma(a_s, k_j, r_ck, is_async=True)
            toward_k = warpgroup_mma(p_s.permute((1, 0)), q_j, toward_k, is_async=True)
            toward_k = warpgroup_mma(ab_s.permute((1, 0)), k_j, toward_k, is_async=True)
            toward_q, r_ck, toward_k = warpgroup_mma_wait(0, deps=(toward_q, r_ck, toward_k))
            as_query = gl.sum(toward_q * q_j.load(of_c).to(gl.float32), 1)
            dq_ck += toward_q
            as_row = -gl.sum(r_ck * k_ck, 1)
            as_column = gl.sum(toward_k * k_ck, 1)
            dk_ck += toward_k - r_ck * beta_c[:, None]
            sums_s.index(3 * part + 0).store(as_query + as_row * beta_c - as_column)
            sums_s.index(3 * part + 1).store(ended)
            sums_s.index(3 * part + 2).store(as_row + of_value)
            mbarrier.arrive(summed, count=1)
            if part == 1:  # the pair before has left, too
                tma.store_wait(0)
                mbarrier.arrive(qk_empty.index(turn ^ 1), count=1, pred=(number > 0) & (member == 0))
            mbarrier.arrive(empty.index((tile + 3) % SLOTS), count=1)
            mbarrier.wait(summed, phase)
            if part == 0:
                of_gate = gl.where(real, sums_s.index(0).load(row_c) + sums_s.index(3).load(row_c), 0.0)
                all_ended = sums_s.index(1).load(row_c) + sums_s.index(4).load(row_c)
                after = gl.where(rows[:, None] >= columns[None, :], of_gate[:, None], 0.0) + all_ended[:, None]
                at = (b * T + token).to(gl.int64) * HV + hv
                seen = columns < T - token
                gl.store(dg + at + columns * HV, gl.sum(after, 0).to(dg.dtype.element_ty), mask=seen)
                of_beta = sums_s.index(2).load(row_c) + sums_s.index(5).load(row_c)
                gl.store(dbeta + at + rows * HV, of_beta.to(dbeta.dtype.element_ty), mask=real)
            tile += 8
            member_number += 1
        q_j.store(dq_ck.to(dtype))
        k_j.store(dk_ck.to(dtype))
        fence_async_shared()
        mbarrier.arrive(ended_all, count=1)
        mbarrier.wait(ended_all, number & 1)
        if part == 1:
            tma.async_copy_shared_to_global(dq, [b, h, token, 0], q_s.index(turn))
            tma.async_copy_shared_to_global(dk, [b, h, token, 0], k_s.index(turn))
        number += 1  # noqa: SIM113, Gluon has no enumerate
    if part == 1:
        tma.store_wait(0)


@gluon.jit
def hopper_gradient_kernel(
    q,
    k,
    v,
    do,
    states,
    dstates,
    written,
    X,
    sums,
    from_start,
    to_end,
    beta,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    scale,
    T,
    items,
    programs,
    H: gl.constexpr,
    HV: gl.constexpr,
    SLOTS: gl.constexpr,
    TO_COMPUTE: gl.constexpr,
    TO_LOAD: gl.constexpr,
):
    dtype: gl.constexpr = k.dtype
    two: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    NT = (T + 63) // 64
    ring = gl.allocate_shared_memory(dtype, [SLOTS, 64, 128], two)
    q_s = gl.allocate_shared_memory(dtype, [2] + q.block_type.shape, q.layout)
    k_s = gl.allocate_shared_memory(dtype, [2] + k.block_type.shape, k.layout)
    p_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    a_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    ab_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    c_s = gl.allocate_shared_memory(gl.float32, [2] + sums.block_type.shape, sums.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [2] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [2] + to_end.block_type.shape, to_end.layout)
    b_s = gl.allocate_shared_memory(gl.float32, [2] + beta.block_type.shape, beta.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [6, 64], plain)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    qk_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    qk_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    meet = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(qk_full.index(i), count=1)
        mbarrier.init(qk_empty.index(i), count=1)
    for i in gl.static_range(3):
        mbarrier.init(meet.index(i), count=2)
    fence_async_shared()
    tensors = (q, k, v, do, states, dstates, written, X, sums, from_start, to_end, beta)
    outs = (dq, dk, dv)
    gates = (dg, dbeta)
    squares = (p_s, a_s, ab_s)
    vectors = (c_s, g_s, d_s, b_s)
    tiles = (ring, q_s, k_s)
    barriers = (full, empty, qk_full, qk_empty)
    counts = (items, programs)
    gl.warp_specialize(
        [
            (_compute, (outs, gates, tiles, squares, vectors, sums_s, barriers, meet, counts, scale, T, NT, H, HV, 0)),
            (_compute, (outs, gates, tiles, squares, vectors, sums_s, barriers, meet, counts, scale, T, NT, H, HV, 1)),
            (_load, (tensors, ring, q_s, k_s, vectors, full, empty, qk_full, qk_empty, items, programs, NT, H, HV)),
        ],
        [4, 1],
        [TO_COMPUTE, TO_LOAD],
    )


def gradients(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor, dstates: Tensor, written: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor, scale: float,
) -> None:  # fmt: skip
    """``dg, dbeta [B, T, HV]``, contiguous, as are dq, dk, dv; ``dv`` holds X before."""
    B, T, H, _ = q.shape
    HV = v.shape[2]
    items = B * triton.cdiv(T, CHUNK) * H
    programs = min(items, chip_of(q).multiprocessors)
    hopper_gradient_kernel[(programs,)](
        _heads(q, SIZE), _heads(k, SIZE), _heads(v, SIZE), _heads(do, SIZE), _tiles(states, 64, SIZE),
        _tiles(dstates, 64, SIZE), _tiles(written, SIZE, CHUNK), _heads(dv, SIZE), _rows(x.c_sum, 1),
        _rows(x.from_start, 1), _rows(x.to_end, 1), _rows(x.beta, 1), _heads(dq, SIZE), _heads(dk, SIZE),
        _heads(dv, SIZE), dg, dbeta, scale, T, items, programs, H=H, HV=HV, SLOTS=SLOTS, TO_COMPUTE=240, TO_LOAD=24,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
