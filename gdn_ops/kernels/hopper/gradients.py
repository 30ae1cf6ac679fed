"""The gradients of the backward on Hopper in one kernel: value_gradient_kernel and key_gradient_kernel of
``kernels/triton/chunk_backward.py`` together, for V a multiple of 128.

A program takes (chunk, key head) pairs one after the other, and the members of each: its value heads, 128 columns of
one at a time. Columns of values only meet in sums, and all that they are summed to is linear in them: dq and dk of a
pair, dg and dbeta of a head. Four roles:

- **a loader**, one warp, has the copy engine (TMA) bring tiles of 16 KiB, in the order in which their places are free:
  those of a member while the one before it is worked on, queries and keys of a pair while the one before it is.
- **two warpgroups** have 64 columns of keys each. ``dP`` is the first one's, ``dA`` the second's; they pass shared
  memory, not memory.
- **a warp for the gates** adds the row sums that the two leave, and makes dg and dbeta of them meanwhile, which it
  keeps in registers until a head's last columns are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

from gdn_ops.kernels.hopper.tiles import (
    ALONG_C,
    OF_C,
    Chunks,
    add,
    chunk_of,
    exp2,
    heads,
    in_keys,
    matrices,
    rows_of,
)
from gdn_ops.kernels.triton.intra_chunk import IntraChunk

SIZE = 128  # K, padded, and the columns of values of a member
# A warpgroup for the loader and the gates, as much of the rest for the others as there is.
REGISTERS, REGISTERS_TO_COMPUTE, REGISTERS_TO_HELP = 168, 240, 24


@gluon.jit
def _chunk_at(index, chunks):
    """Row of the batch, and which chunk of that row is the ``index``-th of all."""
    since, of_since, again, count = chunks
    return index // count, chunk_of(index % count, since, of_since, again)


@gluon.jit
def _load(
    tensors,
    tiles,
    q_s,
    k_s,
    vectors,
    full,
    empty,
    qk_full,
    qk_empty,
    items,
    programs,
    chunks,
    slots_of,
    NT,
    H: gl.constexpr,
    HV: gl.constexpr,
    NV: gl.constexpr,
    IN_KEYS: gl.constexpr,
):
    """Tiles of a member: V', dO, X, v, S, dS (values 0 to 63), S, dS (64 to 127)."""
    q, k, v, do, early, later, places, rows_of_gates = tensors
    states, dstates = early
    later_states, later_dstates = later
    written, dq, dk, X = places
    sums, from_start, to_end, beta = rows_of_gates
    slots, later_slots, later_since = slots_of
    c_s, g_s, d_s, b_s = vectors
    C: gl.constexpr = 64
    GROUP: gl.constexpr = HV // H
    NBYTES: gl.constexpr = 16384
    VECTORS: gl.constexpr = 1280
    dtype: gl.constexpr = tiles.dtype
    four: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    three: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    n_tile = tiles.index(0)._reinterpret(dtype, [1, 1, 64, 128], four)
    do_tile = tiles.index(1)._reinterpret(dtype, [1, 1, 64, 128], four)
    x_tile = tiles.index(2)._reinterpret(dtype, [1, 1, 64, 128], four)
    v_tile = tiles.index(3)._reinterpret(dtype, [1, 1, 64, 128], four)
    number = 0
    members = 0
    for item in range(gl.program_id(0), items, programs):
        b, local = _chunk_at(item // H, chunks)
        h = item % H
        chunk = b * NT + local
        back = NT - 1 - local
        token = local * C
        turn = number & 1
        mbarrier.wait(qk_empty.index(turn), (number >> 1 & 1) ^ 1)
        mbarrier.expect(qk_full.index(turn), 2 * NBYTES)
        tma.async_copy_global_to_shared(k, [b, h, token, 0], qk_full.index(turn), k_s.index(turn))
        tma.async_copy_global_to_shared(q, [b, h, token, 0], qk_full.index(turn), q_s.index(turn))
        for member in range(GROUP * NV):
            hv = h * GROUP + member // NV
            v0 = member % NV * 128
            row = chunk * HV + hv
            slot = (b * slots + local) * HV + hv
            dslot = (b * slots + back) * HV + hv
            later_slot = (b * later_slots - later_since) * HV + hv
            vector = members & 1
            free = (members & 1) ^ 1
            for half in gl.static_range(2):
                ready = full.index(2 + half)
                mbarrier.wait(empty.index(half), free)
                mbarrier.expect(ready, 2 * NBYTES)
                s_tile = tiles.index(4 + 2 * half)._reinterpret(dtype, [1, 64, 128], three)
                ds_tile = tiles.index(5 + 2 * half)._reinterpret(dtype, [1, 64, 128], three)
                at = v0 + half * 64
                if later_states is None:
                    tma.async_copy_global_to_shared(states, [slot, at, 0], ready, s_tile)
                    tma.async_copy_global_to_shared(dstates, [dslot, at, 0], ready, ds_tile)
                else:
                    if local < slots:
                        tma.async_copy_global_to_shared(states, [slot, at, 0], ready, s_tile)
                    else:
                        tma.async_copy_global_to_shared(later_states, [later_slot + local * HV, at, 0], ready, s_tile)
                    if back < slots:
                        tma.async_copy_global_to_shared(dstates, [dslot, at, 0], ready, ds_tile)
                    else:
                        tma.async_copy_global_to_shared(later_dstates, [later_slot + back * HV, at, 0], ready, ds_tile)
            ready = full.index(0)
            mbarrier.expect(ready, 3 * NBYTES + VECTORS)
            if IN_KEYS < GROUP * NV:  # noqa: SIM102, decided when it is compiled; so are those below
                if member >= IN_KEYS:
                    at = h * (GROUP * NV - IN_KEYS) + member - IN_KEYS
                    tma.async_copy_global_to_shared(written, [b, at, token, 0], ready, n_tile)
            if IN_KEYS > 0:  # noqa: SIM102
                if member == 0:
                    tma.async_copy_global_to_shared(dq, [b, h, token, 0], ready, n_tile)
            if IN_KEYS > 1:  # noqa: SIM102
                if member == 1:
                    tma.async_copy_global_to_shared(dk, [b, h, token, 0], ready, n_tile)
            tma.async_copy_global_to_shared(do, [b, hv, token, v0], ready, do_tile)
            tma.async_copy_global_to_shared(X, [b, h * (GROUP * NV) + member, token, 0], ready, x_tile)
            tma.async_copy_global_to_shared(sums, [row, 0], ready, c_s.index(vector))
            tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(vector))
            tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(vector))
            tma.async_copy_global_to_shared(beta, [row, 0], ready, b_s.index(vector))
            ready = full.index(1)
            mbarrier.wait(empty.index(2), free)
            mbarrier.expect(ready, NBYTES)
            tma.async_copy_global_to_shared(v, [b, hv, token, v0], ready, v_tile)
            members += 1
        number += 1  # noqa: SIM113, Gluon has no enumerate


@gluon.jit
def _together(x, y, z):
    """Values ``[64]`` of a warp, when all of its lanes have them: what they were loaded from may be overwritten."""
    return gl.inline_asm_elementwise(
        "bar.sync 15, 32; mov.b32 $0, $6; mov.b32 $1, $7; mov.b32 $2, $8; mov.b32 $3, $9; mov.b32 $4, $10; "
        "mov.b32 $5, $11;",
        "=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
        [x, y, z],
        dtype=(gl.float32, gl.float32, gl.float32),
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _column(x, columns, i: gl.constexpr):
    return gl.sum(gl.where(columns[None, :] == i, x, 0.0), 1)


@gluon.jit
def _gates(
    dg, dbeta, sums_s, summed, gated, items, programs, chunks, T, H: gl.constexpr, HV: gl.constexpr, NV: gl.constexpr
):  # fmt: skip
    """Every gate of a chunk reaches what the tokens after it read and write, and the state after the chunk."""
    C: gl.constexpr = 64
    GROUP: gl.constexpr = HV // H
    four: gl.constexpr = gl.BlockedLayout([2, 4], [32, 1], [1, 1], [1, 0])
    plain: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    rows = gl.arange(0, C, plain)
    columns = gl.arange(0, 4, gl.SliceLayout(0, four))
    members = 0
    for item in range(gl.program_id(0), items, programs):
        b, local = _chunk_at(item // H, chunks)
        token = local * C
        real = rows < T - token
        for head in range(GROUP):
            dg_c = gl.zeros([C], gl.float32, plain)
            dbeta_c = gl.zeros([C], gl.float32, plain)
            for member in range(NV):
                turn = members & 1
                mbarrier.wait(summed.index(turn), members >> 1 & 1)
                sums = sums_s.index(2 * turn).load(four) + sums_s.index(2 * turn + 1).load(four)
                of_gate = gl.convert_layout(_column(sums, columns, 0), plain, assert_trivial=True)
                ended = gl.convert_layout(_column(sums, columns, 1), plain, assert_trivial=True)
                of_beta = gl.convert_layout(_column(sums, columns, 2), plain, assert_trivial=True)
                of_gate, ended, of_beta = _together(of_gate, ended, of_beta)
                mbarrier.arrive(gated.index(turn), count=1)
                after = gl.associative_scan(gl.where(real, of_gate, 0.0), 0, add, reverse=True) + gl.sum(ended, 0)
                dg_c = gl.where(member > 0, dg_c + after, after)
                dbeta_c = gl.where(member > 0, dbeta_c + of_beta, of_beta)
                members += 1
            at = ((b * T + token).to(gl.int64) + rows) * HV + item % H * GROUP + head
            gl.store(dg + at, dg_c.to(dg.dtype.element_ty), mask=real)
            gl.store(dbeta + at, dbeta_c.to(dbeta.dtype.element_ty), mask=real)


@gluon.jit
def _compute(
    outs,
    tiles,
    q_s,
    k_s,
    squares,
    vectors,
    sums_s,
    barriers,
    items,
    programs,
    chunks,
    scale,
    score_scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    NV: gl.constexpr,
    part: gl.constexpr,
):
    dq, dk, dv = outs
    full, empty, qk_full, qk_empty, exchanged, summed, gated, ended_all = barriers
    p_s, a_s, ab_s = squares
    c_s, g_s, d_s, b_s = vectors
    C: gl.constexpr = 64
    GROUP: gl.constexpr = HV // H
    dtype: gl.constexpr = tiles.dtype
    four: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    row_c: gl.constexpr = gl.SliceLayout(1, OF_C)
    rows = gl.arange(0, C, row_c)
    columns = gl.arange(0, C, ALONG_C)
    none = gl.zeros([C, 64], gl.float32, OF_C)
    # The four threads that have the same row of a product, and so its sums, leave one of them each.
    of_4: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [C, 4]
    )
    row_4: gl.constexpr = gl.SliceLayout(1, of_4)
    which = gl.arange(0, 4, gl.SliceLayout(0, of_4))[None, :]
    number = 0
    members = 0
    for item in range(gl.program_id(0), items, programs):
        b, local = _chunk_at(item // H, chunks)
        h = item % H
        token = local * C
        turn = number & 1
        q_j = q_s.index(turn).reshape([C, 128]).slice(part * 64, 64, 1)
        k_j = k_s.index(turn).reshape([C, 128]).slice(part * 64, 64, 1)
        mbarrier.wait(qk_full.index(turn), number >> 1 & 1)
        dq_ck = gl.zeros([C, 64], gl.float32, OF_C)
        dk_ck = gl.zeros([C, 64], gl.float32, OF_C)
        for member in range(GROUP * NV):
            vector = members & 1
            phase = members & 1
            # Hidden from the compiler, which would keep all addresses made of it in registers from member to member.
            first = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
            n_cv = tiles.index(first)
            do_cv = tiles.index(first + 1)
            x_cv = tiles.index(first + 2)
            v_cv = tiles.index(first + 3)
            v_half = v_cv.slice(part * 64, 64, 1)
            mbarrier.wait(full.index(0), phase)
            if part == 0:
                square = warpgroup_mma(do_cv, n_cv.permute((1, 0)), none, use_acc=False, is_async=True)
            else:
                square = warpgroup_mma(x_cv, n_cv.permute((1, 0)), none, use_acc=False, is_async=True)
            beta_c = b_s.index(vector).reshape([C]).load(row_c)
            sums = c_s.index(vector).reshape([2 * C])
            high = sums.slice(0, C)
            low = sums.slice(C, C)
            low_c = low.load(row_c)
            if part == 0:
                low_c += score_scale
            x_half = x_cv.slice(part * 64, 64, 1).load(OF_C).to(gl.float32)
            D_cc = exp2(
                (high.load(row_c)[:, None] - high.load(ALONG_C)[None, :])
                + (low_c[:, None] - low.load(ALONG_C)[None, :])
            )
            mbarrier.wait(full.index(1), phase)
            of_value = gl.sum(x_half * v_half.load(OF_C).to(gl.float32), 1)
            v_half.store((x_half * beta_c[:, None]).to(dtype))
            square = warpgroup_mma_wait(0, deps=(square,))
            # The squares of the member before have been read where its sums are there.
            mbarrier.wait(summed.index(phase ^ 1), (members - 1) >> 1 & 1, pred=members > 0)
            if part == 0:
                p_s.store(gl.where(rows[:, None] >= columns[None, :], square * D_cc, 0.0).to(dtype))
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
            for half in gl.static_range(2):
                mbarrier.wait(full.index(2 + half), phase)
                s_vk = tiles.index(first + 4 + 2 * half).slice(part * 64, 64, 1)
                ds_vk = tiles.index(first + 5 + 2 * half).slice(part * 64, 64, 1)
                toward_q = warpgroup_mma(do_cv.slice(half * 64, 64, 1), s_vk, toward_q, use_acc=half > 0, is_async=True)
                r_ck = warpgroup_mma(x_cv.slice(half * 64, 64, 1), s_vk, r_ck, use_acc=half > 0, is_async=True)
                toward_k = warpgroup_mma(n_cv.slice(half * 64, 64, 1), ds_vk, toward_k, use_acc=half > 0, is_async=True)
                trace += gl.sum(s_vk.load(OF_C).to(gl.float32) * ds_vk.load(OF_C).to(gl.float32), 1)
                toward_q, r_ck, toward_k = warpgroup_mma_wait(0, deps=(toward_q, r_ck, toward_k))
                mbarrier.arrive(empty.index(half), count=1)
            mbarrier.wait(exchanged, phase)
            if part == 1:
                dv_tile = v_cv._reinterpret(dtype, [1, 1, 64, 128], four)
                tma.async_copy_shared_to_global(dv, [b, h * (GROUP * NV) + member, token, 0], dv_tile)
            grown_c = g_s.index(vector).reshape([C]).load(row_c)
            decay_c = d_s.index(vector).reshape([C]).load(row_c)
            whole = gl.sum(g_s.index(vector).reshape([C]).slice(C - 1, 1).load(row_c), 0)
            k_ck = k_j.load(OF_C).to(gl.float32)
            toward_q = toward_q * (grown_c * scale)[:, None]
            toward_k = toward_k * decay_c[:, None]
            ended = gl.sum(toward_k * k_ck, 1) + trace * whole  # all of it is summed, whatever the row
            r_ck = r_ck * grown_c[:, None]
            toward_q = warpgroup_mma(p_s, k_j, toward_q, is_async=True)
            r_ck = warpgroup_mma(a_s, k_j, r_ck, is_async=True)
            toward_k = warpgroup_mma(p_s.permute((1, 0)), q_j, toward_k, is_async=True)
            toward_k = warpgroup_mma(ab_s.permute((1, 0)), k_j, toward_k, is_async=True)
            toward_q, r_ck, toward_k = warpgroup_mma_wait(0, deps=(toward_q, r_ck, toward_k))
            as_query = gl.sum(toward_q * q_j.load(OF_C).to(gl.float32), 1)
            dq_ck += toward_q
            as_row = -gl.sum(r_ck * k_ck, 1)
            as_column = gl.sum(toward_k * k_ck, 1)
            dk_ck += toward_k - r_ck * beta_c[:, None]
            of_gate = gl.convert_layout(as_query + as_row * beta_c - as_column, row_4, assert_trivial=True)
            ended = gl.convert_layout(ended, row_4, assert_trivial=True)
            of_beta = gl.convert_layout(as_row + of_value, row_4, assert_trivial=True)
            mbarrier.wait(gated.index(phase), (members >> 1 & 1) ^ 1)
            sums_s.index(2 * phase + part).store(
                gl.where(which == 0, of_gate[:, None], gl.where(which == 1, ended[:, None], of_beta[:, None]))
            )
            mbarrier.arrive(summed.index(phase), count=1)
            if part == 1:  # the pair before has left, too
                tma.store_wait(0)
                mbarrier.arrive(empty.index(2), count=1)
                mbarrier.arrive(qk_empty.index(turn ^ 1), count=1, pred=(number > 0) & (member == 0))
            members += 1
        q_j.store(dq_ck.to(dtype))
        k_j.store(dk_ck.to(dtype))
        fence_async_shared()
        mbarrier.arrive(ended_all, count=1)
        if part == 1:
            mbarrier.wait(ended_all, number & 1)
            tma.async_copy_shared_to_global(dq, [b, h, token, 0], q_s.index(turn))
            tma.async_copy_shared_to_global(dk, [b, h, token, 0], k_s.index(turn))
        number += 1  # noqa: SIM113, Gluon has no enumerate
    if part == 1:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["since", "of_since", "again", "count", "slots", "later_slots", "later_since"],
)
def hopper_gradient_kernel(
    q,
    k,
    v,
    do,
    states,
    dstates,
    later_states,
    later_dstates,
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
    score_scale,
    T,
    items,
    programs,
    since,
    of_since,
    again,
    count,
    slots,
    later_slots,
    later_since,
    H: gl.constexpr,
    HV: gl.constexpr,
    V: gl.constexpr,
    IN_KEYS: gl.constexpr,
    TO_COMPUTE: gl.constexpr,
    TO_HELP: gl.constexpr,
):
    """``X`` and ``dv`` are the same memory, ``[B, T, HV * NV, 128]``: a head of each member. V' of the first
    ``IN_KEYS`` members of a key head is in dq and dk, that of the others in ``written``. Of every row some chunks
    (``tiles.Chunks``). States before their steps from ``slots`` on are in ``later_states`` (None: there are no
    such), ``later_slots`` a row, from step ``later_since`` on; dS, which goes back, likewise."""
    dtype: gl.constexpr = k.dtype
    two: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    NV: gl.constexpr = V // 128
    NT = (T + 63) // 64
    tiles = gl.allocate_shared_memory(dtype, [8, 64, 128], two)
    q_s = gl.allocate_shared_memory(dtype, [2] + q.block_type.shape, q.layout)
    k_s = gl.allocate_shared_memory(dtype, [2] + k.block_type.shape, k.layout)
    p_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    a_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    ab_s = gl.allocate_shared_memory(dtype, [64, 64], two)
    c_s = gl.allocate_shared_memory(gl.float32, [2] + sums.block_type.shape, sums.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [2] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [2] + to_end.block_type.shape, to_end.layout)
    b_s = gl.allocate_shared_memory(gl.float32, [2] + beta.block_type.shape, beta.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [4, 64, 4], plain)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    qk_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    qk_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    gated = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    exchanged = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ended_all = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(qk_full.index(i), count=1)
        mbarrier.init(qk_empty.index(i), count=1)
        mbarrier.init(summed.index(i), count=2)
        mbarrier.init(gated.index(i), count=1)
    mbarrier.init(empty.index(2), count=1)
    mbarrier.init(exchanged, count=2)
    mbarrier.init(ended_all, count=2)
    fence_async_shared()
    rows_of_gates = (sums, from_start, to_end, beta)
    tensors = (q, k, v, do, (states, dstates), (later_states, later_dstates), (written, dq, dk, X), rows_of_gates)
    outs = (dq, dk, dv)
    squares = (p_s, a_s, ab_s)
    vectors = (c_s, g_s, d_s, b_s)
    barriers = (full, empty, qk_full, qk_empty, exchanged, summed, gated, ended_all)
    chunks = (since, of_since, again, count)
    gdc_wait()
    gdc_launch_dependents()  # a kernel that needs what is there by now, and none of this
    gl.warp_specialize(
        [
            (
                _compute,
                (outs, tiles, q_s, k_s, squares, vectors, sums_s, barriers, items, programs, chunks, scale, score_scale,
                 H, HV, NV, 0),
            ),
            (
                _compute,
                (outs, tiles, q_s, k_s, squares, vectors, sums_s, barriers, items, programs, chunks, scale, score_scale,
                 H, HV, NV, 1),
            ),
            (
                _load,
                (tensors, tiles, q_s, k_s, vectors, full, empty, qk_full, qk_empty, items, programs, chunks,
                 (slots, later_slots, later_since), NT, H, HV, NV, IN_KEYS),
            ),
            (_gates, (dg, dbeta, sums_s, summed, gated, items, programs, chunks, T, H, HV, NV)),
        ],
        [4, 1, 1],
        [TO_COMPUTE, TO_HELP, TO_HELP],
    )  # fmt: skip


def room(k: Tensor, v: Tensor) -> Tensor | None:
    """For V' of the members that dq and dk do not take."""
    B, T, H, _ = k.shape
    members = v.shape[2] // H * (v.shape[3] // SIZE) - in_keys(k, v)
    return k.new_empty((B, T, H * members, SIZE)) if members else None


def prepared(
    x: IntraChunk, do: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor, dstates: Tensor,
    written: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor, scale: float,
    later: tuple[Tensor, Tensor] | None = None,
) -> Callable[..., None]:  # fmt: skip
    """``dg, dbeta [B, T, HV]`` are contiguous, heads of dq, dk, dv may be some of more; ``dv`` holds X before. What is
    returned computes the gradients of some chunks, by so many programs at most; ``later`` are the states and dS of
    steps that ``states`` has no slot for, from step ``later_since`` on."""
    B, T, H, _ = q.shape
    HV, V = v.shape[2:]
    of_members = heads(dv.view(B, T, -1, SIZE), SIZE)
    all_states = [states, dstates, *(later or ())]
    tensors = (
        heads(q, SIZE), heads(k, SIZE), heads(v, SIZE), heads(do, SIZE),
        *(matrices(some, 64, SIZE) for some in all_states), *[None] * (4 - len(all_states)),
        None if written is None else heads(written, SIZE), of_members, rows_of(x.c_sum, 1), rows_of(x.from_start, 1),
        rows_of(x.to_end, 1), rows_of(x.beta, 1), heads(dq, SIZE), heads(dk, SIZE), of_members, dg, dbeta, scale,
        math.log2(scale), T,
    )  # fmt: skip

    def run(chunks: Chunks, most: int, later_since: int = 0) -> None:
        items = B * chunks.count * H
        programs = min(items, most)
        hopper_gradient_kernel[(programs,)](
            *tensors, items, programs, *chunks, states.shape[0] // B, later[0].shape[0] // B if later else 0,
            later_since, H=H, HV=HV, V=V, IN_KEYS=in_keys(k, v), TO_COMPUTE=REGISTERS_TO_COMPUTE,
            TO_HELP=REGISTERS_TO_HELP, num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
        )  # fmt: skip

    return run
