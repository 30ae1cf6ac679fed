"""Everything of a chunk that needs neither the values nor the state, on Hopper: the arithmetic of ``invert_kernel`` in
``kernels/triton/intra_chunk.py``, by four warps a (chunk, value head) where that one has one.

The chunk is four blocks of 16 tokens, and warp ``w`` has the rows of block ``w``:

1. ``K K^T`` by the tensor cores of all four, from a tile that the copy engine (TMA) brings while the gates are summed;
   ``A_ij = beta_i (k_i . k_j) exp(c_i - c_j)``, by sums in two fp32 terms.
2. Each warp inverts its block on the diagonal in registers, by forward substitution (``_substitution``).
3. The rest is substitution of blocks, ``X_lower = -(X_below A) X_above``, of 16 and then of 32 tokens. Left operands
   are what the same warp has in registers, right ones lie in shared memory. Products are three of two bfloat16 terms
   each, good to 2^-16. What all four warps compute for rows that have no such block is not used, and may be anything.

Outputs, and how they are rounded, are those of ``invert_kernel``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gdn_ops.kernels.hopper.tiles import BK, OF_C, Chunks, Squares, add, chunk_of, chunks_between, exp2, heads
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.intra_chunk import ALIKE, LOG2_E, STRETCH, WEAKEST, IntraChunk, strides_of

# Seven programs share a multiprocessor. With 64 registers eight do, and some of their numbers are spilled.
REGISTERS = 72


def substitution_steps() -> list[tuple]:
    """Forward substitution in a block of 16 x 16 that a warp holds as products leave it.

    Lane ``l`` has rows ``l // 4 + 8 h`` and columns ``l % 4 * 2 + p + 8 q`` in register ``4 q + 2 h + p``. With ``Y``
    the identity at first, ``Y_i -= A_ij Y_j`` for ``j = 0, 1, ...``. ``A`` is strictly lower, so nothing asks which
    rows are below ``j``; what is known to be zero is left out. Steps: ``("a", register, l)``, everyone's ``A_ij`` from
    lane ``l`` of the four of its row; ``("y", register, r)``, everyone's ``Y_j`` from row ``r`` of its columns;
    ``("fma", y, a, y_j)``, registers of ``Y``, of the last ``A_ij`` and of the last ``Y_j``.
    """
    steps = []
    for j in range(15):
        q, row, below = j // 8, j % 8, range(j // 7 if j < 8 else 1, 2)
        steps += [("a", 4 * q + 2 * h + j % 2, row // 2) for h in below]
        columns = [4 * c + p for c in range(q + 1) for p in range(2)]
        steps += [("y", 2 * q + c, row) for c in columns]
        steps += [("fma", 2 * h + c, 4 * q + 2 * h + j % 2, 2 * q + c) for h in below for c in columns]
    return steps


def _substitution() -> str:
    """PTX: ``$0`` to ``$7`` is ``(I + A)^-1`` of ``-A`` in ``$8`` to ``$15``."""
    lines = [
        "{ .reg .b32 lane, quad, own, column, from, a<8>, y<8>; .reg .pred on;",
        "mov.u32 lane, %laneid; and.b32 own, lane, 28; and.b32 column, lane, 3; shr.u32 quad, lane, 2;",
        "shl.b32 from, column, 1; setp.eq.u32 on, quad, from; selp.b32 $0, 0x3f800000, 0, on; mov.b32 $6, $0;",
        "add.u32 from, from, 1; setp.eq.u32 on, quad, from; selp.b32 $1, 0x3f800000, 0, on; mov.b32 $7, $1;",
        "mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0;",
    ]
    for kind, *which in substitution_steps():
        if kind == "a":
            register, lane = which
            lines.append(f"or.b32 from, own, {lane}; shfl.sync.idx.b32 a{register}, ${8 + register}, from, 31, -1;")
        elif kind == "y":
            register, row = which
            lines.append(f"or.b32 from, column, {4 * row}; shfl.sync.idx.b32 y{register}, ${register}, from, 31, -1;")
        else:
            y, a, y_j = which
            lines.append(f"fma.rn.f32 ${y}, a{a}, y{y_j}, ${y};")
    return " ".join([*lines, "}"])


_SUBSTITUTION = gl.constexpr(_substitution())
# Outputs are written before the last input is read.
_OPERANDS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))


@gluon.jit
def _invert_16(minus_a):
    """``(I + A)^-1`` of every warp's block."""
    return gl.inline_asm_elementwise(_SUBSTITUTION, _OPERANDS, [minus_a], dtype=gl.float32, is_pure=False, pack=8)


@gluon.jit
def _the_one(x):
    """Of each row, what is not zero. Sums of integers leave out what is known to be zero."""
    return gl.sum(x.to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _halves(x):
    """The left and the right columns."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    return x.reshape([ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _columns_of_16(x, layout: gl.constexpr):
    left, right = _halves(x)
    x0, x1 = _halves(left)
    x2, x3 = _halves(right)
    x0 = gl.convert_layout(x0, layout, assert_trivial=True)
    x1 = gl.convert_layout(x1, layout, assert_trivial=True)
    x2 = gl.convert_layout(x2, layout, assert_trivial=True)
    x3 = gl.convert_layout(x3, layout, assert_trivial=True)
    return x0, x1, x2, x3


@gluon.jit
def _terms(x):
    """Two of bfloat16, side by side in registers from the start."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 low, high; cvt.rn.bf16x2.f32 $0, $3, $2; shl.b32 low, $0, 16; and.b32 high, $0, 0xffff0000; "
        "sub.rn.f32 low, $2, low; sub.rn.f32 high, $3, high; cvt.rn.bf16x2.f32 $1, high, low; }",
        "=&r,=r,r,r",
        [x],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _choose(condition, x, y):
    """``gl.where`` of pairs of 16 bits."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred on; setp.ne.s32 on, $1, 0; selp.b32 $0, $3, $4, on; }",
        "=r,r,r,r,r",
        [condition, x, y],
        dtype=x.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _tile(C: gl.constexpr):
    """Two, or stores into one would wait for each other."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    high = gl.allocate_shared_memory(gl.bfloat16, [C, 16], layout)
    low = gl.allocate_shared_memory(gl.bfloat16, [C, 16], layout)
    return high, low


@gluon.jit
def _keep(tile, high, low):
    tile[0].store(high)
    tile[1].store(low)


@gluon.jit
def _product(a, tile, block: gl.constexpr, to):
    """``to`` and ``a`` times 16 rows of a tile, both in two terms."""
    of: gl.constexpr = to.type.layout
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=of, k_width=2)
    high = gl.convert_layout(a[0], left)
    low = gl.convert_layout(a[1], left)
    b_high = tile[0].slice(16 * block, 16).load(right)
    b_low = tile[1].slice(16 * block, 16).load(right)
    to = mma_v2(low, b_high, to)
    to = mma_v2(high, b_low, to)
    return mma_v2(high, b_high, to)


@gluon.jit
def _from_lane(x, lane):
    """The second of two values of each lane, of one lane for all."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $3, $4, 31, -1; mov.b32 $1, $0;",
        "=&r,=r,r,r,r,r",
        [x, lane],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _minus_a(kk, since_i, until_s, by_warp: gl.constexpr, block: gl.constexpr):
    """Sixteen columns of ``-A`` in terms, for rows that are below all of them."""
    C: gl.constexpr = kk.shape[0]
    until_j = until_s.slice(16 * block, 16, 1).load(gl.SliceLayout(1, by_warp))[:, None, :]
    until_j = (until_j + gl.zeros([4, 16, 16], gl.float32, by_warp)).reshape([C, 16])
    return _terms(kk * since_i[:, None] * gl.convert_layout(until_j, kk.type.layout, assert_trivial=True))


@gluon.jit
def _round_rows(out, rows_s, alike_s, BACKWARDS: gl.constexpr):
    """Rounds rows, and what one loses the next one gets, as far as their keys are alike. Backwards, from the row after
    it: what these two have in common stands there."""
    C: gl.constexpr = rows_s.shape[0]
    across: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    columns = gl.arange(0, C, across)
    alike_s = alike_s._reinterpret(gl.float32, [C, 1], alike_s.layout)
    rows_s = rows_s._reinterpret(gl.float32, [C, C], alike_s.layout)
    left = gl.zeros([C], gl.float32, across)
    for n in range(0, C, 8):
        for m in gl.static_range(8):
            i = C - 1 - n - m if BACKWARDS else n + m
            if BACKWARDS:  # nothing is left before the first row
                add = alike_s.index(gl.minimum(i + 1, C - 1)).load(across)
            else:
                add = alike_s.index(i).load(across)
            row = rows_s.index(i).load(across) + add * left
            rounded = row.to(out.dtype.element_ty)
            gl.store(out + i * C + columns, rounded)
            left = row - rounded.to(gl.float32)


@gluon.jit
def _beside(left, right):
    ROWS: gl.constexpr = left.shape[0]
    COLUMNS: gl.constexpr = left.shape[1]
    return gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * COLUMNS])


@gluon.jit
def _square(x0, x1, x2, x3):
    return _beside(_beside(x0, x1), _beside(x2, x3))


@gluon.jit
def _store(out, tile):
    """Rows of 128 bytes, 16 a thread."""
    C: gl.constexpr = tile.shape[0]
    by_16: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, C, gl.SliceLayout(1, by_16))
    columns = gl.arange(0, C, gl.SliceLayout(0, by_16))
    gl.store(out + rows[:, None] * C + columns[None, :], tile.load(by_16))


@gluon.jit(
    do_not_specialize=["since", "of_since", "again", "count", "t_since", "t_each", "i_since", "i_each"],
)
def hopper_invert_kernel(
    k,
    g,
    beta,
    c_sum,
    from_start,
    to_end,
    rate,
    erasing,
    scaled,
    inverse,
    T,
    since,
    of_since,
    again,
    count,
    t_since,
    t_each,
    i_since,
    i_each,
    stride_g_b,
    stride_g_t: gl.constexpr,
    stride_g_h,
    stride_beta_b,
    stride_beta_t: gl.constexpr,
    stride_beta_h,
    H: gl.constexpr,
    HV: gl.constexpr,
    SCALE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Outputs are those of ``invert_kernel``; ``rate``, ``erasing`` and ``inverse`` may be None. Of every sequence
    some chunks (``tiles.Chunks``); T and the inverse are ``tiles.Squares``. ``EARLY``: it starts before the kernel
    before it is over, and is not over before that one is, so that what comes next need not know."""
    C: gl.constexpr = k.block_type.shape[2]
    BK: gl.constexpr = k.block_type.shape[3]
    of: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    along_i: gl.constexpr = gl.SliceLayout(1, of)
    along_j: gl.constexpr = gl.SliceLayout(0, of)
    # The same by warp, row and column of a warp's block.
    by_warp: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 8, 0], [0, 0, 8]],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [4, 16, 16],
    )
    own_i: gl.constexpr = gl.SliceLayout(2, by_warp)
    own_j: gl.constexpr = gl.SliceLayout(1, by_warp)
    each: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    every_warp: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain_2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    gdc_launch_dependents()  # the narrow scan's programs may start, and wait for the end
    program = gl.program_id(0)
    hv = program % HV
    b = program // HV // count
    chunk = chunk_of(program // HV % count, since, of_since, again)
    begin = chunk * C
    k_s = gl.allocate_shared_memory(k.dtype, k.block_type.shape, k.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, k.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [b, hv // (HV // H), begin, 0], ready, k_s)

    # Two warps load gates, two betas: of either each number is a cache line's, and four warps would load it four times.
    g += b.to(gl.int64) * stride_g_b + begin.to(gl.int64) * stride_g_t + hv.to(gl.int64) * stride_g_h
    beta += b.to(gl.int64) * stride_beta_b + begin.to(gl.int64) * stride_beta_t + hv.to(gl.int64) * stride_beta_h
    both = gl.arange(0, 2 * C, gl.BlockedLayout([1], [32], [4], [0]))
    row = both % C
    loaded_g = gl.load(g + row * stride_g_t, mask=(both < C) & (row < T - begin), other=0.0)
    loaded_beta = gl.load(beta + row * stride_beta_t, mask=(both >= C) & (row < T - begin), other=0.0)
    loaded_s = gl.allocate_shared_memory(gl.float32, [2 * C], plain)
    loaded_s.store(gl.where(both < C, loaded_g.to(gl.float32), loaded_beta.to(gl.float32)))
    rows = gl.arange(0, C, every_warp)
    g_c = loaded_s.slice(0, C).load(every_warp).to(gl.float64)
    beta_c = loaded_s.slice(C, C).load(every_warp)
    g_c = gl.where(g_c < WEAKEST, WEAKEST, g_c) * LOG2_E
    c = gl.associative_scan(g_c, 0, add)
    high_c = c.to(gl.float32)
    low_c = (c - high_c.to(gl.float64)).to(gl.float32)
    high_s = gl.allocate_shared_memory(gl.float32, [C], plain)
    low_s = gl.allocate_shared_memory(gl.float32, [C], plain)
    rate_s = gl.allocate_shared_memory(gl.float32, [C], plain)
    gate_s = gl.allocate_shared_memory(gl.float32, [C], plain)
    ends_s = gl.allocate_shared_memory(gl.float32, [4, C], plain_2)
    until_s = gl.allocate_shared_memory(gl.float32, [4, C], plain_2)
    high_s.store(high_c)
    low_s.store(low_c)
    rate_s.store(beta_c * SCALE)
    gate_s.store(exp2(g_c.to(gl.float32)))
    # Decay from a token to the end of the block before a warp's, or about there: where is the same for the decay from
    # there on, and so neither is above one by more than that.
    lane = gl.arange(0, 4, gl.SliceLayout(1, each))[:, None] * 8 - 1
    high_wc = gl.convert_layout(high_c, gl.SliceLayout(0, each), assert_trivial=True)[None, :]
    low_wc = gl.convert_layout(low_c, gl.SliceLayout(0, each), assert_trivial=True)[None, :]
    end = _from_lane(high_wc, lane)
    ends_s.store(end)
    until_s.store(exp2((end - high_wc) - low_wc))
    NT = (T + C - 1) // C
    here = ((b * NT + chunk) * HV + hv).to(gl.int64) * C
    grown = exp2(high_c)
    gl.store(c_sum + here * 2 + rows, high_c)
    gl.store(c_sum + here * 2 + C + rows, low_c)
    gl.store(from_start + here + rows, grown)
    if erasing is not None:
        gl.store(rate + here + rows, beta_c)
        gl.store(erasing + here + rows, -beta_c * grown)

    mbarrier.wait(ready, 0)
    high = high_s.reshape([4, 16])
    low = low_s.reshape([4, 16])
    high_i = high.load(own_i)
    low_i = low.load(own_i)
    high_j = high.load(own_j)
    low_j = low.load(own_j)
    end_i = ends_s.slice(0, 1, 1).load(own_i)
    minus_beta_i = -loaded_s.reshape([8, 16]).slice(4, 4).load(own_i)
    left = (high_s.slice(C - 1, 1).load(every_warp) - high_c) + (low_s.slice(C - 1, 1).load(every_warp) - low_c)
    # Not before these loads: of a barrier while a product runs Triton believes that it ends what the product reads.
    k_ck = k_s.reshape([C, BK])
    none = gl.zeros([C, C], gl.float32, OF_C)
    kk = warpgroup_mma(k_ck, k_ck.permute((1, 0)), none, use_acc=False, is_async=True)
    gl.store(to_end + here + rows, exp2(left) * (1 / SCALE))
    since_i = minus_beta_i * exp2((high_i - end_i) + low_i)
    since_i = gl.convert_layout(since_i.reshape([C]), along_i, assert_trivial=True)
    own_D = exp2((high_i[:, :, None] - high_j[:, None, :]) + (low_i[:, :, None] - low_j[:, None, :]))
    own_D = gl.convert_layout((own_D * minus_beta_i[:, :, None]).reshape([C, 16]), of, assert_trivial=True)
    kk = warpgroup_mma_wait(0, deps=(kk,))
    kk0, kk1, kk2, kk3 = _columns_of_16(kk, of)

    i = gl.arange(0, C, along_i)[:, None]
    j = gl.arange(0, 16, along_j)[None, :]
    warp = i >> 4
    own_kk = gl.where(warp == 0, kk0, gl.where(warp == 1, kk1, gl.where(warp == 2, kk2, kk3)))
    own_a = gl.where((i & 15) > j, own_kk * own_D, 0.0)

    # How much of its key each token has in common with the one before it, after the decay in between.
    before = gl.where(warp == 1, kk0, gl.where(warp == 2, kk1, kk2))
    before = gl.where(((i & 15) == 0) & (j == 15) & (warp > 0), before, 0.0)
    common = _the_one(gl.where((i & 15) == j + 1, own_kk, before))
    own = _the_one(gl.where((i & 15) == j, own_kk, 0.0))
    alike = gl.where(own > 0, common * _reciprocal(own), 0.0)
    alike = gl.minimum(gl.maximum(alike, -1.0), 1.0) * gate_s.load(along_i)
    alike_s = gl.allocate_shared_memory(gl.float32, [C], plain)
    alike_s.store(alike)

    a0_s = _tile(C)
    a1_s = _tile(C)
    a2_s = _tile(C)
    a_high, a_low = _minus_a(kk0, since_i, until_s, by_warp, 0)
    _keep(a0_s, a_high, a_low)
    a_high, a_low = _minus_a(kk1, since_i, until_s, by_warp, 1)
    _keep(a1_s, a_high, a_low)
    a_high, a_low = _minus_a(kk2, since_i, until_s, by_warp, 2)
    _keep(a2_s, a_high, a_low)
    x = _invert_16(own_a)
    x_high, x_low = _terms(x)
    x_s = _tile(C)
    _keep(x_s, x_high, x_low)
    # What is kept to here shares no memory with what is stored before: that would take another barrier.
    until_s._keep_alive()
    ends_s._keep_alive()
    gate_s._keep_alive()
    high_s._keep_alive()
    low_s._keep_alive()
    loaded_s._keep_alive()
    ready._keep_alive()

    # Blocks (1, 0) and (3, 2), of the odd warps.
    zero = gl.zeros([C, 16], gl.float32, of)
    a = (x_high, x_low)
    upper = warp < 2
    y = _terms(gl.where(upper, _product(a, a0_s, 1, zero), _product(a, a2_s, 3, zero)))
    y = gl.where(upper, _product(y, x_s, 0, zero), _product(y, x_s, 2, zero))
    y_s = _tile(C)
    y_high, y_low = _terms(y)
    _keep(y_s, y_high, y_low)
    a2_s[0]._keep_alive()
    a2_s[1]._keep_alive()

    # The rows below of the left half, of the lower two warps: two blocks of columns, each from two of rows.
    odd = warp & 1
    nothing = gl.zeros([C, 16], gl.bfloat16, of)
    first = (_choose(odd, y_high, x_high), _choose(odd, y_low, x_low))
    second = (_choose(odd, x_high, nothing), _choose(odd, x_low, nothing))
    z0 = _terms(_product(second, a0_s, 3, _product(first, a0_s, 2, zero)))
    z1 = _terms(_product(second, a1_s, 3, _product(first, a1_s, 2, zero)))
    left = _product(z1, y_s, 1, _product(z0, x_s, 0, zero))
    right = _product(z1, x_s, 1, zero)

    near = gl.where(odd == 1, y, x)
    own = gl.where(odd == 1, x, 0.0)
    x0 = gl.where(upper, near, left)
    x1 = gl.where(upper, own, right)
    x2 = gl.where(upper, 0.0, near)
    x3 = gl.where(upper, 0.0, own)
    x = _square(x0, x1, x2, x3)
    of_rate: gl.constexpr = gl.SliceLayout(0, x.type.layout)
    scaled += ((b * t_each + chunk - t_since) * HV + hv).to(gl.int64) * (C * C)
    if inverse is not None:
        inverse += ((b * i_each + chunk - i_since) * HV + hv).to(gl.int64) * (C * C)
    dtype: gl.constexpr = k.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    if gl.max((gl.abs(alike_s.load(every_warp)) > ALIKE).to(gl.int32), 0) == 0:
        if inverse is not None:
            i_s = gl.allocate_shared_memory(dtype, [C, C], square)
            i_s.permute((1, 0)).store(x.to(dtype))
        t_s = gl.allocate_shared_memory(dtype, [C, C], square)
        t_s.store((x * rate_s.load(of_rate)[None, :]).to(dtype))
        if inverse is not None:
            _store(inverse, i_s)
        _store(scaled, t_s)
        for tile in gl.static_range(2):
            x_s[tile]._keep_alive()
            y_s[tile]._keep_alive()
    else:
        rows_s = gl.allocate_shared_memory(gl.float32, [C, C], plain_2)
        if inverse is not None:
            rows_s.permute((1, 0)).store(x)
            _round_rows(inverse, rows_s, alike_s, True)
        rows_s.store(x * rate_s.load(of_rate)[None, :])
        _round_rows(scaled, rows_s, alike_s, False)
    if EARLY:  # noqa: SIM102, decided when it is compiled
        if program == gl.num_programs(0) - 1:
            gdc_wait()


def inverse_by_parts(
    k: Tensor, g: Tensor, beta: Tensor, table: ChunkTable, backward: bool = False
) -> tuple[IntraChunk, Callable[..., None]]:
    """Room for what :func:`invert` gives but T and the inverse, and what fills some chunks of every sequence, of those
    two (``backward``: the inverse, too) as well. ``early``: while the kernel that was started last, of which it reads
    nothing, still runs, if that one lets it."""
    T, H = k.shape[1:3]
    HV = g.shape[2]

    def vector(width: int = CHUNK) -> Tensor:
        return torch.empty((table.chunks, HV, width), dtype=torch.float32, device=k.device)

    rate, erasing = (vector(), vector()) if backward else (None, None)
    x = IntraChunk(vector(2 * CHUNK), vector(), vector(), None, None, rate, erasing, None, None)
    tensors = (heads(k, BK), g, beta, x.c_sum, x.from_start, x.to_end, rate, erasing)

    def run(chunks: Chunks, scaled: Squares, inverse: Squares | None = None, early: bool = False) -> None:
        inverse = inverse or Squares(None, 0, 0)
        hopper_invert_kernel[(k.shape[0] * chunks.count * HV,)](
            *tensors, scaled.x, inverse.x, T, *chunks, *scaled[1:], *inverse[1:], **strides_of("g", g),
            **strides_of("beta", beta), H=H, HV=HV, SCALE=1.0 if backward else STRETCH, EARLY=early, num_warps=4,
            maxnreg=REGISTERS, launch_pdl=early,
        )  # fmt: skip

    return x, run


def squares(k: Tensor, HV: int, since: int, until: int) -> Squares:
    """Room for those of the chunks ``since`` to ``until``."""
    each = until - since
    return Squares(k.new_empty((k.shape[0] * each, HV, CHUNK, CHUNK)), since, each)


def invert(k: Tensor, g: Tensor, beta: Tensor, table: ChunkTable, backward: bool = False) -> IntraChunk:
    """What the kernels for Hopper take in place of ``intra_chunk``'s, for calls that ``hopper.serves`` takes."""
    x, run = inverse_by_parts(k, g, beta, table, backward)
    chunks = table.chunks // k.shape[0]
    scaled, inverse = (squares(k, g.shape[2], 0, chunks) if wanted else None for wanted in (True, backward))
    run(chunks_between(0, chunks), scaled, inverse)
    return x._replace(T=scaled.x, inverse=inverse and inverse.x)
