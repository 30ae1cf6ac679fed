"""Both scans of the backward on Hopper, by roles as in ``scan.py``: a loader, and warpgroups with 64 columns of values.

Even programs are the forward scan, which writes the state before each chunk and V', odd ones carry the gradient of the
state back (``kernels/triton/chunk_backward.py`` has the formulas). What they write leaves by the copy engine. The way
back's scores are made by a warpgroup of their own where one computes, and where two do by these, a chunk ahead, while
they wait for products of their chain; ``scale exp(c)`` stands with the rows of dO, not of Q. X is left with the tokens
first, in the memory of dv, whose tiles take its place, and V' in that of dq and dk.

Alone, the way back is the reverse map of segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

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

from gdn_ops.kernels.hopper.tiles import (
    ALONG_C,
    BK,
    BV,
    LEFT_C,
    LEFT_K,
    OF_C,
    OF_K,
    Squares,
    decays,
    heads,
    in_keys,
    keep_scores,
    last_of,
    likeness,
    matrices,
    next_stage,
    rows_of,
    scores,
    state_tile,
)
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import IntraChunk

# Of three warpgroups, one of them for the loader: ptxas plans with the mean, and the roles take what they need.
REGISTERS, REGISTERS_TO_HELP, REGISTERS_TO_LOAD = 168, 240, 24


@gluon.jit
def _load_forth(
    tensors, tiles, full, empty, b, begin, h, v0, row, square, chunks, HV: gl.constexpr, PARTS: gl.constexpr
):
    _, k, v, _, transition, _, _, from_start, to_end, _ = tensors
    _, k_s, v_s, t_s, _, g_s, d_s, _ = tiles
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = v.block_type.shape[3]
    STAGES: gl.constexpr = k_s.shape[0]
    BYTES: gl.constexpr = (
        k.block_type.nbytes
        + PARTS * v.block_type.nbytes
        + transition.block_type.nbytes
        + from_start.block_type.nbytes
        + to_end.block_type.nbytes
    )
    hv = row % HV
    stage = 0
    phase = 1
    token = begin
    for _ in range(chunks):
        mbarrier.wait(empty.index(stage), phase)
        ready = full.index(stage)
        mbarrier.expect(ready, BYTES)
        tma.async_copy_global_to_shared(k, [b, h, token, 0], ready, k_s.index(stage))
        tma.async_copy_global_to_shared(transition, [square * C, 0], ready, t_s.index(stage))
        for part in gl.static_range(PARTS):
            at = v_s.index(PARTS * stage + part)
            tma.async_copy_global_to_shared(v, [b, hv, token, v0 + part * BV], ready, at)
        tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(stage))
        tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(stage))
        row += HV
        square += HV
        token += C
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _load_back(
    tensors, tiles, full, empty, b, begin, h, v0, row, square, chunks, HV: gl.constexpr, PARTS: gl.constexpr
):
    q, k, _, do, _, inverse, sums, from_start, to_end, erasing = tensors
    q_s, k_s, v_s, t_s, c_s, g_s, d_s, e_s = tiles
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = do.block_type.shape[3]
    STAGES: gl.constexpr = k_s.shape[0]
    BYTES: gl.constexpr = (
        q.block_type.nbytes
        + k.block_type.nbytes
        + PARTS * do.block_type.nbytes
        + inverse.block_type.nbytes
        + sums.block_type.nbytes
        + from_start.block_type.nbytes
        + to_end.block_type.nbytes
        + erasing.block_type.nbytes
    )
    hv = row % HV
    stage = 0
    phase = 1
    row += (chunks - 1) * HV
    square += (chunks - 1) * HV
    token = begin + (chunks - 1) * C
    for _ in range(chunks):
        mbarrier.wait(empty.index(stage), phase)
        ready = full.index(stage)
        mbarrier.expect(ready, BYTES)
        tma.async_copy_global_to_shared(k, [b, h, token, 0], ready, k_s.index(stage))
        tma.async_copy_global_to_shared(q, [b, h, token, 0], ready, q_s.index(stage))
        tma.async_copy_global_to_shared(sums, [row, 0], ready, c_s.index(stage))
        for part in gl.static_range(PARTS):
            at = v_s.index(PARTS * stage + part)
            tma.async_copy_global_to_shared(do, [b, hv, token, v0 + part * BV], ready, at)
        tma.async_copy_global_to_shared(to_end, [row, 0], ready, d_s.index(stage))
        tma.async_copy_global_to_shared(inverse, [square * C, 0], ready, t_s.index(stage))
        tma.async_copy_global_to_shared(erasing, [row, 0], ready, e_s.index(stage))
        tma.async_copy_global_to_shared(from_start, [row, 0], ready, g_s.index(stage))
        row -= HV
        square -= HV
        token -= C
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _load(
    tensors, tiles, full, empty, forth, b, begin, h, v0, row, square, chunks, HV: gl.constexpr, PARTS: gl.constexpr
):  # fmt: skip
    if forth:
        _load_forth(tensors, tiles, full, empty, b, begin, h, v0, row, square, chunks, HV, PARTS)
    else:
        _load_back(tensors, tiles, full, empty, b, begin, h, v0, row, square, chunks, HV, PARTS)


@gluon.jit
def _enter(state, at, v0, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """A tile ``[BV, BK]`` of a state in memory (None: zeros), each number of which the compiler believes to be another:
    of equal ones ptxas runs the products one by one (C7511)."""
    if state is None:
        S_vk = gl.zeros([BV, BK], gl.float32, OF_K)
        S_vk = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [S_vk], dtype=gl.float32, is_pure=False, pack=1)
    else:
        offsets, mask = state_tile(v0, K, V, BK, BV)
        S_vk = gl.load(state + at.to(gl.int64) * (K * V) + offsets, mask=mask, other=0.0).to(gl.float32)
    return S_vk


@gluon.jit
def _forth(
    outs,
    states_in,
    place,
    tiles,
    s_out,
    n_out,
    full,
    empty,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTS: gl.constexpr,
    H: gl.constexpr,
    IN_KEYS: gl.constexpr,
    part: gl.constexpr,
):
    SIZE: gl.constexpr = 128  # the columns of a member
    MEMBERS: gl.constexpr = HV // H * (V // SIZE)
    states, written, dq, dk, _, _ = outs
    before, _, _, reached = states_in
    b, token, hv, v0, segment, slot, _, _, _, chunks = place
    _, k_s, v_s, t_s, _, g_s, d_s, _ = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype
    v0 += part * BV
    h = hv // (HV // H)
    member = hv % (HV // H) * (V // SIZE) + v0 // SIZE
    none_c = gl.zeros([BV, C], gl.float32, OF_C)
    s_tile = s_out.index(part)
    n_tile = n_out.index(part)
    S_vk = _enter(before, segment * HV + hv, v0, K, V, BK, BV)
    low_vk = S_vk.to(dtype)
    mbarrier.wait(full.index(0), 0)
    S_vk = S_vk * last_of(g_s.index(0))
    stage = 0
    phase = 0
    for i in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        k_ck = k_s.index(stage).reshape([C, BK])
        v_cv = v_s.index(PARTS * stage + part).reshape([C, BV])
        t_jc = t_s.index(stage).permute((1, 0))
        S_low = gl.convert_layout(low_vk, LEFT_C)
        stored_vc = warpgroup_mma(S_low, k_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        w_vc = warpgroup_mma(v_cv.permute((1, 0)), t_jc, none_c, use_acc=False, is_async=True)
        tma.store_wait(0)
        s_tile.reshape([BV, BK]).store(low_vk)
        fence_async_shared()
        tma.async_copy_shared_to_global(states, [slot, v0, 0], s_tile)
        grown_c = g_s.index(stage).reshape([C]).load(ALONG_C)
        decay_c = d_s.index(stage).reshape([C]).load(ALONG_C)
        stored_vc, w_vc = warpgroup_mma_wait(0, deps=(stored_vc, w_vc))
        erased_vc = gl.convert_layout((stored_vc * -grown_c[None, :]).to(dtype), LEFT_C)
        new_vc = warpgroup_mma(erased_vc, t_jc, w_vc, is_async=True)
        new_vc = warpgroup_mma_wait(0, deps=(new_vc,))
        decayed_vc = gl.convert_layout((new_vc * decay_c[None, :]).to(dtype), LEFT_K)
        S_vk = warpgroup_mma(decayed_vc, k_ck, S_vk, is_async=True)
        n_tile.reshape([C, BV]).permute((1, 0)).store(new_vc.to(dtype))
        fence_async_shared()
        more = i + 1 < chunks
        ahead, phase_ahead = next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(ahead), phase_ahead, pred=more)
        whole = gl.where(more, last_of(g_s.index(ahead)), 1.0)
        S_vk = warpgroup_mma_wait(0, deps=(S_vk,))
        mbarrier.arrive(empty.index(stage), count=1)
        # Not while a product runs: ptxas has them end where there is a branch.
        if IN_KEYS < MEMBERS:  # noqa: SIM102, decided when it is compiled; so are those below
            if member >= IN_KEYS:
                at = h * (MEMBERS - IN_KEYS) + member - IN_KEYS
                tma.async_copy_shared_to_global(written, [b, at, token, v0 % SIZE], n_tile)
        if IN_KEYS > 0:  # noqa: SIM102
            if member == 0:
                tma.async_copy_shared_to_global(dq, [b, h, token, v0 % SIZE], n_tile)
        if IN_KEYS > 1:  # noqa: SIM102
            if member == 1:
                tma.async_copy_shared_to_global(dk, [b, h, token, v0 % SIZE], n_tile)
        low_vk = S_vk.to(dtype)
        S_vk = S_vk * whole
        slot += HV
        token += C
        stage = ahead
        phase = phase_ahead
    if reached is not None:
        offsets, mask = state_tile(v0, K, V, BK, BV)
        gl.store(reached + (segment * HV + hv).to(gl.int64) * (K * V) + offsets, S_vk, mask=mask)
    tma.store_wait(0)


@gluon.jit
def _back(
    outs,
    states_in,
    scales,
    place,
    tiles,
    p_s,
    s_out,
    n_out,
    full,
    empty,
    scored,
    used,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTS: gl.constexpr,
    MAP: gl.constexpr,
    part: gl.constexpr,
):
    _, _, _, _, dstates, X = outs
    _, after, leave, _ = states_in
    scale, score_scale = scales
    b, first_token, hv, v0, segment, slot, n, first, last, chunks = place
    q_s, k_s, v_s, t_s, c_s, g_s, d_s, e_s = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    BV: gl.constexpr = v_s.shape[4]
    dtype: gl.constexpr = k_s.dtype
    along_left: gl.constexpr = gl.SliceLayout(0, LEFT_K)
    v0 += part * BV
    none_c = gl.zeros([BV, C], gl.float32, OF_C)
    s_tile = s_out.index(part)
    n_tile = n_out.index(part)
    if MAP and after is not None:
        S_vk = _enter(None, n, v0, K, V, BK, BV)
        if last:
            S_vk = _enter(after, n * HV + hv, v0, K, V, BK, BV)
    else:
        S_vk = _enter(after, segment * HV + hv, v0, K, V, BK, BV)
    low_vk = S_vk.to(dtype)
    mbarrier.wait(full.index(0), 0)
    S_vk = S_vk * last_of(g_s.index(0))
    if PARTS > 1:
        qk_cj = likeness(q_s, k_s, 0, PARTS, part)
        D_cj = decays(c_s, 0, score_scale, C, PARTS, part)
        qk_cj = warpgroup_mma_wait(0, deps=(qk_cj,))
        keep_scores(scores(qk_cj, D_cj, part, dtype), p_s.index(0), part)
        mbarrier.arrive(scored.index(0), count=1)
    token = first_token + (chunks - 1) * C
    stage = 0
    phase = 0
    for i in range(chunks):
        k_ck = k_s.index(stage).reshape([C, BK])
        do_vc = v_s.index(PARTS * stage + part).reshape([C, BV]).permute((1, 0))
        S_low = gl.convert_layout(low_vk, LEFT_C)
        kept_vc = warpgroup_mma(S_low, k_ck.permute((1, 0)), none_c, use_acc=False, is_async=True)
        mbarrier.wait(scored.index(i & 1), i >> 1 & 1)
        e_vc = warpgroup_mma(do_vc, p_s.index(i & 1), none_c, use_acc=False, is_async=True)
        if not MAP:
            tma.store_wait(0)
            s_tile.reshape([BV, BK]).store(low_vk)
            fence_async_shared()
            tma.async_copy_shared_to_global(dstates, [slot, v0, 0], s_tile)
        more = i + 1 < chunks
        ahead, phase_ahead = next_stage(stage, phase, STAGES)
        grown_c = g_s.index(stage).reshape([C]).load(along_left) * scale
        grown_vc = (do_vc.load(LEFT_K).to(gl.float32) * grown_c[None, :]).to(dtype)
        decay_c = d_s.index(stage).reshape([C]).load(ALONG_C)
        erasing_c = e_s.index(stage).reshape([C]).load(ALONG_C)
        kept_vc, e_vc = warpgroup_mma_wait(0, deps=(kept_vc, e_vc))
        if PARTS == 1:
            mbarrier.arrive(used.index(i & 1), count=1)
        dnew_vc = gl.convert_layout((kept_vc * decay_c[None, :] + e_vc).to(dtype), LEFT_C)
        x_vc = warpgroup_mma(dnew_vc, t_s.index(stage).permute((1, 0)), none_c, use_acc=False, is_async=True)
        S_vk = warpgroup_mma(grown_vc, q_s.index(stage).reshape([C, BK]), S_vk, is_async=True)
        mbarrier.wait(full.index(ahead), phase_ahead, pred=more)
        if PARTS > 1:  # the scores of the chunk ahead; after the last one, of what is there
            qk_cj = likeness(q_s, k_s, ahead, PARTS, part)
            D_cj = decays(c_s, ahead, score_scale, C, PARTS, part)
        whole = gl.where(more, last_of(g_s.index(ahead)), 1.0)
        x_vc = warpgroup_mma_wait(PARTS, deps=(x_vc,))
        erased_vc = gl.convert_layout((x_vc * erasing_c[None, :]).to(dtype), LEFT_K)
        S_vk = warpgroup_mma(erased_vc, k_ck, S_vk, is_async=True)
        if not MAP:
            n_tile.reshape([C, BV]).permute((1, 0)).store(x_vc.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(X, [b, hv, token, v0], n_tile)
        if PARTS > 1:
            qk_cj, S_vk = warpgroup_mma_wait(0, deps=(qk_cj, S_vk))
        else:
            S_vk = warpgroup_mma_wait(0, deps=(S_vk,))
        mbarrier.arrive(empty.index(stage), count=1)
        if PARTS > 1:
            keep_scores(scores(qk_cj, D_cj, part, dtype), p_s.index((i + 1) & 1), part)
            mbarrier.arrive(scored.index((i + 1) & 1), count=1)
        low_vk = S_vk.to(dtype)
        S_vk = S_vk * whole
        slot += HV
        token -= C
        stage = ahead
        phase = phase_ahead
    if leave is not None:
        if MAP:
            offsets, mask = state_tile(v0, K, V, BK, BV)
            gl.store(leave + (segment * HV + hv).to(gl.int64) * (K * V) + offsets, S_vk, mask=mask)
        elif first:
            offsets, mask = state_tile(v0, K, V, BK, BV)
            gl.store(leave + (n * HV + hv).to(gl.int64) * (K * V) + offsets, S_vk, mask=mask)
    if not MAP:
        tma.store_wait(0)


@gluon.jit
def _compute(
    outs,
    states_in,
    scales,
    forth,
    place,
    tiles,
    p_s,
    s_out,
    n_out,
    full,
    empty,
    scored,
    used,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    H: gl.constexpr,
    PARTS: gl.constexpr,
    MAP: gl.constexpr,
    IN_KEYS: gl.constexpr,
    part: gl.constexpr,
):
    if forth:
        _forth(outs, states_in, place, tiles, s_out, n_out, full, empty, HV, K, V, PARTS, H, IN_KEYS, part)
    else:
        _back(
            outs, states_in, scales, place, tiles, p_s, s_out, n_out, full, empty, scored, used, HV, K, V, PARTS, MAP,
            part,
        )  # fmt: skip


@gluon.jit
def _score(scales, tiles, p_s, full, empty, scored, used, forth, chunks):
    """The scores of the way back, two chunks ahead of their use."""
    _, score_scale = scales
    q_s, k_s, _, _, c_s, _, _, _ = tiles
    STAGES: gl.constexpr = k_s.shape[0]
    C: gl.constexpr = k_s.shape[3]
    dtype: gl.constexpr = k_s.dtype
    stage = 0
    phase = 0
    for i in range(gl.where(forth, 0, chunks)):
        mbarrier.wait(full.index(stage), phase)
        qk_cj = likeness(q_s, k_s, stage, 1, 0)
        D_cj = decays(c_s, stage, score_scale, C, 1, 0)
        qk_cj = warpgroup_mma_wait(0, deps=(qk_cj,))
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.wait(used.index(i & 1), (i >> 1 & 1) ^ 1)
        keep_scores(scores(qk_cj, D_cj, 0, dtype), p_s.index(i & 1), 0)
        mbarrier.arrive(scored.index(i & 1), count=1)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit(
    do_not_specialize=["since", "until", "t_since", "t_each", "i_since", "i_each", "slots", "shift"],
)
def hopper_both_ways_kernel(
    q,
    k,
    v,
    do,
    transition,
    inverse,
    sums,
    from_start,
    to_end,
    erasing,
    states,
    written,
    dq,
    dk,
    dstates,
    X,
    before,
    after,
    leave,
    reached,
    scale,
    score_scale,
    T,
    SEGMENT,
    since,
    until,
    t_since,
    t_each,
    i_since,
    i_each,
    slots,
    shift,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    TO_HELP: gl.constexpr,
    TO_LOAD: gl.constexpr,
    MAP: gl.constexpr,
    IN_KEYS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """``before``, ``after`` and ``reached``, the state after, are of each segment, ``leave`` of each sequence, the four
    may be None. V' of the first ``IN_KEYS`` members of a key head goes to dq and dk, that of the others to ``written``.
    Either way takes its steps from ``since`` to ``until``. With ``MAP`` there is the way back alone, over all segments
    but first ones: ``after`` is of each sequence, ``leave`` of each segment, nothing else is written.

    T and the inverse are ``tiles.Squares``. What a step leaves in states and dstates, ``slots`` a sequence of either,
    has the number of the step plus ``shift``: dS after the last chunk is first. ``EARLY``: as that of the inverse."""
    gdc_launch_dependents()
    C: gl.constexpr = k.block_type.shape[2]
    BV: gl.constexpr = do.block_type.shape[3]
    NV: gl.constexpr = (V + PARTS * BV - 1) // (PARTS * BV)
    NT = (T + C - 1) // C
    parts = (NT + SEGMENT - 1) // SEGMENT
    program = gl.program_id(0)
    if MAP:
        forth: gl.constexpr = False
    else:
        forth = program % 2 == 0
        program = program // 2
    v0 = program % NV * (PARTS * BV)
    hv = program // NV % HV
    segment = program // (NV * HV)
    if MAP:
        segment = segment // (parts - 1) * parts + segment % (parts - 1) + 1
    b = segment // parts
    part = segment % parts
    first = part * SEGMENT
    chunks = gl.minimum(SEGMENT, NT - first)
    steps = gl.minimum(until, chunks) - since
    if forth:
        first += since
    else:
        first += chunks - since - steps
    chunks = steps
    row = (b * NT + first) * HV + hv
    if forth:
        square = (b * t_each + first - t_since) * HV + hv
        slot = (b * slots + first + shift) * HV + hv
    else:
        square = (b * i_each + first - i_since) * HV + hv
        slot = (b * slots + NT - first - chunks + shift) * HV + hv

    dtype: gl.constexpr = k.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q.block_type.shape, q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(dtype, [PARTS * STAGES] + do.block_type.shape, do.layout)
    t_s = gl.allocate_shared_memory(dtype, [STAGES] + inverse.block_type.shape, inverse.layout)
    c_s = gl.allocate_shared_memory(gl.float32, [STAGES] + sums.block_type.shape, sums.layout)
    g_s = gl.allocate_shared_memory(gl.float32, [STAGES] + from_start.block_type.shape, from_start.layout)
    d_s = gl.allocate_shared_memory(gl.float32, [STAGES] + to_end.block_type.shape, to_end.layout)
    e_s = gl.allocate_shared_memory(gl.float32, [STAGES] + erasing.block_type.shape, erasing.layout)
    p_s = gl.allocate_shared_memory(dtype, [2] + inverse.block_type.shape, inverse.layout)
    if MAP:
        s_out = p_s
        n_out = p_s
    else:
        s_out = gl.allocate_shared_memory(dtype, [PARTS] + states.block_type.shape, states.layout)
        n_out = gl.allocate_shared_memory(dtype, [PARTS] + X.block_type.shape, X.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        if PARTS == 1 and forth:
            mbarrier.init(empty.index(i), count=1)
        else:
            mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=PARTS)
        mbarrier.init(used.index(i), count=1)
    fence_async_shared()

    tensors = (q, k, v, do, transition, inverse, sums, from_start, to_end, erasing)
    tiles = (q_s, k_s, v_s, t_s, c_s, g_s, d_s, e_s)
    outs = (states, written, dq, dk, dstates, X)
    states_in = (before, after, leave, reached)
    scales = (scale, score_scale)
    place = (b, first * C, hv, v0, segment, slot, b, part == 0, part == parts - 1, chunks)
    h = hv // (HV // H)
    if not EARLY:
        gdc_wait()
    if PARTS == 1:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (outs, states_in, scales, forth, place, tiles, p_s, s_out, n_out, full, empty, scored, used, HV, K,
                     V, H, PARTS, MAP, IN_KEYS, 0),
                ),
                (_score, (scales, tiles, p_s, full, empty, scored, used, forth, chunks)),
                (_load, (tensors, tiles, full, empty, forth, b, first * C, h, v0, row, square, chunks, HV, PARTS)),
            ],
            [4, 1],
            [TO_HELP, TO_LOAD],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (outs, states_in, scales, forth, place, tiles, p_s, s_out, n_out, full, empty, scored, used, HV, K,
                     V, H, PARTS, MAP, IN_KEYS, 0),
                ),
                (
                    _compute,
                    (outs, states_in, scales, forth, place, tiles, p_s, s_out, n_out, full, empty, scored, used, HV, K,
                     V, H, PARTS, MAP, IN_KEYS, 1),
                ),
                (_load, (tensors, tiles, full, empty, forth, b, first * C, h, v0, row, square, chunks, HV, PARTS)),
            ],
            [4, 1],
            [TO_HELP, TO_LOAD],
        )  # fmt: skip
    if EARLY:  # noqa: SIM102, decided when it is compiled
        if gl.program_id(0) == gl.num_programs(0) - 1:
            gdc_wait()


def _prepared(
    x: IntraChunk, inverse: Squares, do: Tensor, q: Tensor, k: Tensor, table: ChunkTable, scale: float, programs: int,
    **arguments,
) -> Callable[..., None]:  # fmt: skip
    """Starts the kernel with ``programs`` pieces of 64 columns of values, two of them in a program where they are too
    many for one each."""
    T, H, K = k.shape[1:]
    HV, V = do.shape[2:]
    parts = 1 if programs * HV * triton.cdiv(V, BV) <= chip_of(k).multiprocessors else 2
    return partial(
        hopper_both_ways_kernel[(programs * HV * triton.cdiv(V, parts * BV),)],
        heads(q, BK), heads(k, BK), do=heads(do, BV), inverse=rows_of(inverse.x, CHUNK), sums=rows_of(x.c_sum, 1),
        from_start=rows_of(x.from_start, 1), to_end=rows_of(x.to_end, 1), erasing=rows_of(x.erasing, 1), scale=scale,
        score_scale=math.log2(scale), T=T, SEGMENT=table.segment or triton.cdiv(T, CHUNK), i_since=inverse.since,
        i_each=inverse.each, H=H, HV=HV, K=K, V=V, PARTS=parts, STAGES=3 if parts == 1 else 2,
        TO_HELP=REGISTERS_TO_HELP, TO_LOAD=REGISTERS_TO_LOAD, num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
        **arguments,
    )  # fmt: skip


def prepared(
    x: IntraChunk, scaled: Squares, inverse: Squares, do: Tensor, q: Tensor, k: Tensor, v: Tensor, table: ChunkTable,
    scale: float, *, states: Tensor, written: Tensor | None, dq: Tensor, dk: Tensor, dstates: Tensor, X: Tensor,
) -> Callable[..., None]:  # fmt: skip
    """``X`` is ``[B, T, HV, V]``, ``written`` what ``gradients.room`` gives, ``x`` and the squares from ``invert``.
    ``states`` and ``dstates`` have the same number of slots for every sequence. What is returned takes the other
    arguments of the kernel: the states ``before``, ``after``, ``leave`` and ``reached``, the steps ``since`` to
    ``until``, how far they are from their slots (``shift``), and ``EARLY``."""
    return _prepared(
        x, inverse, do, q, k, table, scale, 2 * table.segments, v=heads(v, BV), transition=rows_of(scaled.x, CHUNK),
        t_since=scaled.since, t_each=scaled.each, states=matrices(states, BV, BK),
        written=None if written is None else heads(written, BV), dq=heads(dq, BV), dk=heads(dk, BV),
        dstates=matrices(dstates, BV, BK), X=heads(X, BV), slots=states.shape[0] // v.shape[0], IN_KEYS=in_keys(k, v),
        MAP=False,
    )  # fmt: skip


def reverse_maps(
    x: IntraChunk, inverse: Squares, do: Tensor, q: Tensor, k: Tensor, table: ChunkTable, scale: float, *,
    enter: Tensor | None, leave: Tensor,
) -> None:  # fmt: skip
    """``dS`` before each segment but first ones, from zero or for last segments from ``enter [N, HV, K, V]``."""
    nothing = ("v", "transition", "states", "written", "dq", "dk", "dstates", "X", "before", "reached")
    run = _prepared(
        x, inverse, do, q, k, table, scale, table.segments - table.sequences, **dict.fromkeys(nothing), t_since=0,
        t_each=0, slots=0, shift=0, IN_KEYS=0, MAP=True,
    )  # fmt: skip
    run(after=enter, leave=leave, since=0, until=table.segment, EARLY=False)
