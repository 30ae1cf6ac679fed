"""Everything of a chunk that needs neither the values nor the state, on the GPU: the start of forward and backward.

With ``c = cumsum(g)`` inside a chunk of ``C = 64`` tokens and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)        inverse = (I + A)^-1        P = scale * (Q K^T) * D

**invert_kernel**, one warp a (chunk, value head). The chunk is four blocks of 16 tokens: the ten lower blocks of ``A``
are computed one by one, so that none has to be cut out of a larger tile. The four on the diagonal are inverted in
halves by forward substitution in fp32, the others by block substitution (``I_20 = -I_22 (A_20 I_00 + A_21 I_10)`` and
so on), with products of fp32 accuracy: repeated keys make ``A`` anything but small. Written are ``T = inverse
diag(beta)`` and, for the backward, the transposed inverse, both rounded so that with keys that repeat the errors do not
add up (``_round_rows``); ``c`` (fp64: a strong gate must not cost the digits of the weak ones after it),
``from_start = exp(c)``, ``to_end = exp(c_C - c)`` and, for the backward, ``beta`` and ``erasing = -beta exp(c)``. For a
forward of 16 bits ``T`` is larger, ``P`` and ``to_end`` smaller by ``STRETCH``. On Hopper it may be
``kernels/hopper/invert.py``.

**score_kernel**, one program a (chunk, key head, part of its value heads): the product of queries and keys once, ``P``
for every value head of the part; for the delta rule's backward ``scale * exp(c) * Q`` too. Without the delta it is all
that is left here (``linear_attention.py``).

Buffers between kernels are ``[chunks, HV, C, ...]``. Where a chunk ends early their rows hold what a token would leave
that writes nothing and does not decay: no key, no beta, and the last ``c``. So whoever reads them needs no mask, finds
every row on a 16-byte boundary, and the decay of the whole chunk in the last place.

Sources: the chunk form, arXiv 2412.06464, section 3.3; the blockwise inverse, flash-linear-attention's ``solve_tril``.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of
from gdn_ops.kernels.triton.launch import launch

# One key again and again with beta near 1 makes a T of ones and minus ones. Then V' is differences of 16-bit values,
# many of which lie halfway between two others, where rounding costs most. A V' that is larger by this seldom does; few
# bits, so that T's ones stay exact.
STRETCH = 1.375
# Keys of which no two neighbours have as much in common are rounded each for itself. It costs a fifth of the kernel to
# do otherwise, and a tenth of the accuracy not to where all keys have as much in common with each other.
ALIKE = tl.constexpr(0.35)
# Below this a gate is an exact zero in fp64 too; clamping keeps -inf and 1e30 out of the sums.
WEAKEST = tl.constexpr(-1000.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def high(x):
    """``x`` rounded to what bfloat16 holds, by its bits: a conversion and back takes more instructions."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """``a b`` in fp32; with ``LOW``, bfloat16, by three products of two terms each, which is good to 2^-16."""
    if LOW is None:
        ab = tl.dot(a, b, input_precision=PRECISION)
    else:
        a0 = high(a)
        b0 = high(b)
        a1 = (a - a0).to(LOW)
        b1 = (b - b0).to(LOW)
        a0 = a0.to(LOW)
        b0 = b0.to(LOW)
        ab = tl.dot(a0, b0, tl.dot(a0, b1, tl.dot(a1, b0)))
    return ab


@triton.jit
def _exp(x):
    """Of fp64 numbers, in fp32. ``tl.exp`` takes three instructions more, for results below 2^-126."""
    return tl.exp2(x.to(tl.float32) * LOG2_E)


@triton.jit
def _block(kk, beta_i, c_i, until_end_j, end_j):
    """A block of ``A`` left of the diagonal: ``exp(c_i - c_j)`` by way of the end of the block of ``j``, which lies
    between them, so that neither factor is above one."""
    return kk * (beta_i * _exp(c_i - end_j))[:, None] * until_end_j[None, :]


@triton.jit
def _diagonal_block(kk, beta, c):
    rows = tl.arange(0, 16)
    strict = rows[:, None] > rows[None, :]
    D = _exp(c[:, None] - c[None, :])
    return tl.where(strict, kk * beta[:, None] * D, 0.0)


@triton.jit
def _store_eights(work, A, first: tl.constexpr):
    """The two blocks of 8 x 8 on the diagonal of ``A [16, 16]``, negative, column by column."""
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    tl.store(work + (first + i // 8) * 64 + j % 8 * 8 + i % 8, -A, mask=i // 8 == j // 8)


@triton.jit
def _invert_eights(work):
    """Eight blocks in place, by forward substitution of a row of each at a time."""
    block = tl.arange(0, 8)[:, None, None]
    j = tl.arange(0, 8)[None, :, None]
    i = tl.arange(0, 8)[None, None, :]
    at = work + block * 64 + j * 8 + i
    tl.debug_barrier()  # what is read here, other threads have stored
    inverse = tl.load(at)
    for step in range(2, 8):
        row = tl.sum(tl.where(i == step, inverse, 0.0), axis=2)
        row += tl.sum(row[:, None, :] * inverse, axis=2)
        inverse = tl.where(i == step, row[:, :, None], inverse)
    tl.debug_barrier()
    tl.store(at, inverse + tl.where(i == j, 1.0, 0.0))
    tl.debug_barrier()


@triton.jit
def _invert_16(work, A, first: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^-1`` of a strictly lower 16 x 16 block, from the inverses of its blocks of 8 x 8."""
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    eight = i // 8 == j // 8
    inverse = tl.load(work + (first + i // 8) * 64 + j % 8 * 8 + i % 8, mask=eight, other=0.0)
    x = _product(tl.where(eight, 0.0, A), inverse, LOW, PRECISION)
    return inverse - _product(inverse, x, LOW, PRECISION)


@triton.jit
def _store_16(x, rest, alike, block, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    at = (i * 16 + tl.arange(0, 16))[:, None] * C + (j * 16 + tl.arange(0, 16))[None, :]
    rounded = block.to(x.dtype.element_ty)
    tl.store(x + at, rounded)
    if rest is not None:
        tl.store(rest + at, (block - rounded.to(tl.float32)).to(rest.dtype.element_ty), mask=alike)


@triton.jit
def _store_both(scaled, rest, inverse, alike, of_T, block, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    """A block of ``T`` into ``scaled``, and the same one of the inverse into the transposed inverse."""
    _store_16(scaled, rest, alike, of_T, i, j, C)
    if inverse is not None:
        _store_16(inverse, None if rest is None else rest + C * C, alike, tl.trans(block), j, i, C)


@triton.jit
def _exact_row(x, rest, likeness, i, AFTER: tl.constexpr, C: tl.constexpr):
    """A row, and how much of what the row before it loses is added to it. Backwards, from the row after it: what these
    two have in common stands there."""
    at = i * C + tl.arange(0, C)
    row = tl.load(x + at).to(tl.float32) + tl.load(rest + at).to(tl.float32)
    return row, tl.load(likeness + i + AFTER, mask=i + AFTER < C, other=0.0)


@triton.jit
def _round_row(x, row, add, i, C: tl.constexpr):
    row += add
    rounded = row.to(x.dtype.element_ty)
    tl.store(x + i * C + tl.arange(0, C), rounded)
    return row - rounded.to(tl.float32)


@triton.jit
def _round_rows(x, rest, likeness, first: tl.constexpr, step: tl.constexpr, C: tl.constexpr):
    """Rounds ``x + rest``, and what one row loses the next one gets, as far as their keys are alike."""
    AFTER: tl.constexpr = 1 if step < 0 else 0
    tl.debug_barrier()  # what is read here, other threads have stored
    left = tl.zeros([C], dtype=tl.float32)
    for n in range(0, C, 8):
        i = first + n * step
        # All loaded before any is stored, or each load would wait for the store before it.
        r0, a0 = _exact_row(x, rest, likeness, i + 0 * step, AFTER, C)
        r1, a1 = _exact_row(x, rest, likeness, i + 1 * step, AFTER, C)
        r2, a2 = _exact_row(x, rest, likeness, i + 2 * step, AFTER, C)
        r3, a3 = _exact_row(x, rest, likeness, i + 3 * step, AFTER, C)
        r4, a4 = _exact_row(x, rest, likeness, i + 4 * step, AFTER, C)
        r5, a5 = _exact_row(x, rest, likeness, i + 5 * step, AFTER, C)
        r6, a6 = _exact_row(x, rest, likeness, i + 6 * step, AFTER, C)
        r7, a7 = _exact_row(x, rest, likeness, i + 7 * step, AFTER, C)
        left = _round_row(x, r0, a0 * left, i + 0 * step, C)
        left = _round_row(x, r1, a1 * left, i + 1 * step, C)
        left = _round_row(x, r2, a2 * left, i + 2 * step, C)
        left = _round_row(x, r3, a3 * left, i + 3 * step, C)
        left = _round_row(x, r4, a4 * left, i + 4 * step, C)
        left = _round_row(x, r5, a5 * left, i + 5 * step, C)
        left = _round_row(x, r6, a6 * left, i + 6 * step, C)
        left = _round_row(x, r7, a7 * left, i + 7 * step, C)


@triton.jit
def _store_likeness(likeness, kk, kk_before, g, first: tl.constexpr):
    """Of 16 tokens: how much of its key each has in common with the one before it, after the decay in between. Returns
    the most."""
    r = tl.arange(0, 16)
    i = r[:, None]
    j = r[None, :]
    common = tl.sum(tl.where(i == j + 1, kk, 0.0), axis=1)
    if kk_before is not None:
        common += tl.sum(tl.where((i == 0) & (j == 15), kk_before, 0.0), axis=1)
    own = tl.sum(tl.where(i == j, kk, 0.0), axis=1)
    alike = tl.where(own > 0, common / tl.where(own > 0, own, 1.0), 0.0)
    alike = tl.minimum(tl.maximum(alike, -1.0), 1.0)
    alike *= tl.exp(g.to(tl.float32))
    tl.store(likeness + first + r, alike)
    return tl.max(tl.abs(alike), axis=0)


@triton.jit
def _store_gates(
    c_sum, from_start, to_end, rate, erasing, c, total, beta, rows, SCALE: tl.constexpr
):  # fmt: skip
    grown = _exp(c)
    tl.store(c_sum + rows, c)
    tl.store(from_start + rows, grown)
    if erasing is not None:
        tl.store(rate + rows, beta)
        tl.store(erasing + rows, -beta * grown)
    tl.store(to_end + rows, _exp(total - c) / SCALE)


@triton.jit
def invert_kernel(
    k,
    g,
    beta,
    c_sum,
    from_start,
    to_end,
    rate,
    erasing,
    scaled,
    rest,
    likeness,
    work,
    inverse,
    cu_seqlens,
    chunk_offsets,
    T,
    N,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    stride_g_b,
    stride_g_t: tl.constexpr,
    stride_g_h,
    stride_beta_b,
    stride_beta_t: tl.constexpr,
    stride_beta_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scaled`` is ``SCALE * T``, ``to_end`` divided by ``SCALE``, ``inverse`` the transposed inverse, or None.
    ``rest`` and ``likeness [C]`` are scratch, None where fp32 holds all digits."""
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of(program // HV, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    k += b * stride_k_b + begin * stride_k_t + hv // (HV // H) * stride_k_h
    g += b * stride_g_b + begin * stride_g_t + hv * stride_g_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    here = program.to(tl.int64) * C
    c_sum += here
    from_start += here
    to_end += here
    if erasing is not None:
        rate += here
        erasing += here
    scaled += here * C
    work += here * 8
    if rest is not None:
        rest += here * C * (1 if inverse is None else 2)
        likeness += here
    if inverse is not None:
        inverse += here * C

    r0 = tl.arange(0, 16)
    r1 = 16 + r0
    r2 = 32 + r0
    r3 = 48 + r0
    g0 = tl.load(g + r0 * stride_g_t, mask=r0 < length, other=0.0).to(tl.float64)
    g1 = tl.load(g + r1 * stride_g_t, mask=r1 < length, other=0.0).to(tl.float64)
    g2 = tl.load(g + r2 * stride_g_t, mask=r2 < length, other=0.0).to(tl.float64)
    g3 = tl.load(g + r3 * stride_g_t, mask=r3 < length, other=0.0).to(tl.float64)
    g0 = tl.where(g0 < WEAKEST, WEAKEST, g0)
    g1 = tl.where(g1 < WEAKEST, WEAKEST, g1)
    g2 = tl.where(g2 < WEAKEST, WEAKEST, g2)
    g3 = tl.where(g3 < WEAKEST, WEAKEST, g3)
    end0 = tl.sum(g0, axis=0)
    end1 = end0 + tl.sum(g1, axis=0)
    end2 = end1 + tl.sum(g2, axis=0)
    total = end2 + tl.sum(g3, axis=0)
    c0 = tl.cumsum(g0, axis=0)
    c1 = tl.cumsum(g1, axis=0) + end0
    c2 = tl.cumsum(g2, axis=0) + end1
    c3 = tl.cumsum(g3, axis=0) + end2
    beta0 = tl.load(beta + r0 * stride_beta_t, mask=r0 < length, other=0.0).to(tl.float32)
    beta1 = tl.load(beta + r1 * stride_beta_t, mask=r1 < length, other=0.0).to(tl.float32)
    beta2 = tl.load(beta + r2 * stride_beta_t, mask=r2 < length, other=0.0).to(tl.float32)
    beta3 = tl.load(beta + r3 * stride_beta_t, mask=r3 < length, other=0.0).to(tl.float32)
    _store_gates(c_sum, from_start, to_end, rate, erasing, c0, total, beta0, r0, SCALE)
    _store_gates(c_sum, from_start, to_end, rate, erasing, c1, total, beta1, r1, SCALE)
    _store_gates(c_sum, from_start, to_end, rate, erasing, c2, total, beta2, r2, SCALE)
    _store_gates(c_sum, from_start, to_end, rate, erasing, c3, total, beta3, r3, SCALE)

    kk00 = tl.zeros([16, 16], dtype=tl.float32)
    kk10 = tl.zeros([16, 16], dtype=tl.float32)
    kk11 = tl.zeros([16, 16], dtype=tl.float32)
    kk20 = tl.zeros([16, 16], dtype=tl.float32)
    kk21 = tl.zeros([16, 16], dtype=tl.float32)
    kk22 = tl.zeros([16, 16], dtype=tl.float32)
    kk30 = tl.zeros([16, 16], dtype=tl.float32)
    kk31 = tl.zeros([16, 16], dtype=tl.float32)
    kk32 = tl.zeros([16, 16], dtype=tl.float32)
    kk33 = tl.zeros([16, 16], dtype=tl.float32)
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        inside = (columns < K)[None, :]
        k0 = tl.load(k + r0[:, None] * stride_k_t + columns[None, :], mask=(r0 < length)[:, None] & inside, other=0.0)
        k1 = tl.load(k + r1[:, None] * stride_k_t + columns[None, :], mask=(r1 < length)[:, None] & inside, other=0.0)
        k2 = tl.load(k + r2[:, None] * stride_k_t + columns[None, :], mask=(r2 < length)[:, None] & inside, other=0.0)
        k3 = tl.load(k + r3[:, None] * stride_k_t + columns[None, :], mask=(r3 < length)[:, None] & inside, other=0.0)
        t0 = tl.trans(k0)
        t1 = tl.trans(k1)
        t2 = tl.trans(k2)
        kk00 = tl.dot(k0, t0, kk00, input_precision=PRECISION)
        kk10 = tl.dot(k1, t0, kk10, input_precision=PRECISION)
        kk20 = tl.dot(k2, t0, kk20, input_precision=PRECISION)
        kk30 = tl.dot(k3, t0, kk30, input_precision=PRECISION)
        kk11 = tl.dot(k1, t1, kk11, input_precision=PRECISION)
        kk21 = tl.dot(k2, t1, kk21, input_precision=PRECISION)
        kk31 = tl.dot(k3, t1, kk31, input_precision=PRECISION)
        kk22 = tl.dot(k2, t2, kk22, input_precision=PRECISION)
        kk32 = tl.dot(k3, t2, kk32, input_precision=PRECISION)
        kk33 = tl.dot(k3, tl.trans(k3), kk33, input_precision=PRECISION)

    alike = False
    if rest is not None:
        most = _store_likeness(likeness, kk00, None, g0, 0)
        most = tl.maximum(most, _store_likeness(likeness, kk11, kk10, g1, 16))
        most = tl.maximum(most, _store_likeness(likeness, kk22, kk21, g2, 32))
        most = tl.maximum(most, _store_likeness(likeness, kk33, kk32, g3, 48))
        alike = most > ALIKE
    until0 = _exp(end0 - c0)
    until1 = _exp(end1 - c1)
    until2 = _exp(end2 - c2)
    a00 = _diagonal_block(kk00, beta0, c0)
    a11 = _diagonal_block(kk11, beta1, c1)
    a22 = _diagonal_block(kk22, beta2, c2)
    a33 = _diagonal_block(kk33, beta3, c3)
    _store_eights(work, a00, 0)
    _store_eights(work, a11, 2)
    _store_eights(work, a22, 4)
    _store_eights(work, a33, 6)
    _invert_eights(work)
    # Loaded again, which is cheaper than to hold them until here. Each block is stored as soon as it is there, or all
    # of them would be held to the end.
    rate0 = tl.load(beta + r0 * stride_beta_t, mask=r0 < length, other=0.0).to(tl.float32) * SCALE
    rate1 = tl.load(beta + r1 * stride_beta_t, mask=r1 < length, other=0.0).to(tl.float32) * SCALE
    rate2 = tl.load(beta + r2 * stride_beta_t, mask=r2 < length, other=0.0).to(tl.float32) * SCALE
    rate3 = tl.load(beta + r3 * stride_beta_t, mask=r3 < length, other=0.0).to(tl.float32) * SCALE
    zero = tl.zeros([16, 16], dtype=tl.float32)
    _store_both(scaled, rest, inverse, alike, zero, zero, 0, 1, C)
    _store_both(scaled, rest, inverse, alike, zero, zero, 0, 2, C)
    _store_both(scaled, rest, inverse, alike, zero, zero, 0, 3, C)
    _store_both(scaled, rest, inverse, alike, zero, zero, 1, 2, C)
    _store_both(scaled, rest, inverse, alike, zero, zero, 1, 3, C)
    _store_both(scaled, rest, inverse, alike, zero, zero, 2, 3, C)
    i00 = _invert_16(work, a00, 0, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i00 * rate0[None, :], i00, 0, 0, C)
    i11 = _invert_16(work, a11, 2, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i11 * rate1[None, :], i11, 1, 1, C)
    a10 = _block(kk10, beta1, c1, until0, end0)
    i10 = -_product(i11, _product(a10, i00, LOW, PRECISION), LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i10 * rate0[None, :], i10, 1, 0, C)
    i22 = _invert_16(work, a22, 4, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i22 * rate2[None, :], i22, 2, 2, C)
    a21 = _block(kk21, beta2, c2, until1, end1)
    i21 = -_product(i22, _product(a21, i11, LOW, PRECISION), LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i21 * rate1[None, :], i21, 2, 1, C)
    a20 = _block(kk20, beta2, c2, until0, end0)
    x = _product(a20, i00, LOW, PRECISION)
    x += _product(a21, i10, LOW, PRECISION)
    i20 = -_product(i22, x, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i20 * rate0[None, :], i20, 2, 0, C)
    i33 = _invert_16(work, a33, 6, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i33 * rate3[None, :], i33, 3, 3, C)
    a32 = _block(kk32, beta3, c3, until2, end2)
    i32 = -_product(i33, _product(a32, i22, LOW, PRECISION), LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i32 * rate2[None, :], i32, 3, 2, C)
    a31 = _block(kk31, beta3, c3, until1, end1)
    x = _product(a31, i11, LOW, PRECISION)
    x += _product(a32, i21, LOW, PRECISION)
    i31 = -_product(i33, x, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i31 * rate1[None, :], i31, 3, 1, C)
    a30 = _block(kk30, beta3, c3, until0, end0)
    x = _product(a30, i00, LOW, PRECISION)
    x += _product(a31, i10, LOW, PRECISION)
    x += _product(a32, i20, LOW, PRECISION)
    i30 = -_product(i33, x, LOW, PRECISION)
    _store_both(scaled, rest, inverse, alike, i30 * rate0[None, :], i30, 3, 0, C)
    if rest is not None:
        if alike:
            _round_rows(scaled, rest, likeness, 0, 1, C)
            if inverse is not None:
                _round_rows(inverse, rest + C * C, likeness, C - 1, -1, C)


@triton.jit
def score_kernel(
    q,
    k,
    c_sum,
    P,
    grown,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t: tl.constexpr,
    stride_q_h,
    stride_k_b,
    stride_k_t: tl.constexpr,
    stride_k_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    MEMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grown`` None: only ``P``. A program has ``MEMBERS`` value heads, fewer in a key head's last part."""
    GROUP: tl.constexpr = HV // H
    PARTS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    scale = tl.cast(scale, tl.float32)  # Inductor passes fp64
    program = tl.program_id(0)
    first = program % PARTS * MEMBERS
    past = tl.minimum(first + MEMBERS, GROUP)
    h = (program // PARTS % H).to(tl.int64)
    chunk = (program // (PARTS * H)).to(tl.int64)
    b, begin, length = chunk_of(chunk, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    rows = tl.arange(0, C)
    real = rows < length
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    one = tl.where(length > 0, 1.0, 0.0)
    qk = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        mask = real[:, None] & (columns < K)[None, :]
        q_ck = tl.load(q + rows[:, None] * stride_q_t + columns[None, :], mask=mask, other=0.0)
        k_ck = tl.load(k + rows[:, None] * stride_k_t + columns[None, :], mask=mask, other=0.0)
        # By one, so that it ends here: the tile that is also read below must not be overwritten while it runs.
        qk = tl.dot(q_ck, tl.trans(k_ck), qk, input_precision=PRECISION) * one
        if grown is not None:
            for member in range(first, past):
                here = (chunk * HV + h * GROUP + member) * C
                factor_c = tl.exp(tl.load(c_sum + here + rows).to(tl.float32)) * scale
                grown_ck = (q_ck.to(tl.float32) * factor_c[:, None]).to(grown.dtype.element_ty)
                at = here * K + rows[:, None] * K + columns[None, :]
                tl.store(grown + at, grown_ck, mask=(columns < K)[None, :])
    for member in range(first, past):
        here = (chunk * HV + h * GROUP + member) * C
        c = tl.load(c_sum + here + rows)
        D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
        p_cc = tl.where(lower, qk * D * scale, 0.0).to(P.dtype.element_ty)
        tl.store(P + here * C + rows[:, None] * C + rows[None, :], p_cc)


class IntraChunk(NamedTuple):
    """``[chunks, HV, C]`` in fp64 (``c_sum``) or fp32; in the dtype of q ``[chunks, HV, C, C]``. For the backward: two
    more of each, and ``grown_q [chunks, HV, C, K]``; ``inverse`` is the transposed one. Of the kernels
    for Hopper, ``P`` and ``grown_q`` are None, and ``c_sum`` two terms ``[chunks, HV, 2 C]`` in fp32, in units of log2.
    What has been used may have been dropped (None)."""

    c_sum: Tensor
    from_start: Tensor
    to_end: Tensor
    T: Tensor | None
    P: Tensor | None
    beta: Tensor | None
    erasing: Tensor | None
    inverse: Tensor | None
    grown_q: Tensor | None


def precision_of(x: Tensor) -> str:
    """How fp32 operands are multiplied: exactly for fp32 inputs, by three TF32 products where 16-bit inputs have left
    some that are not cut into two terms (``low_of``).

    Exact products of wide keys need 180 KiB of shared memory; chips with less multiply fp32 inputs by TF32 too. On
    Hopper they may not: a kernel with 64 rows of fp32 by three TF32 products read out of bounds there (Triton
    3.6, K = V = 128), though the values at K = V = 64 were good to 4e-7.
    """
    chip = chip_of(x)
    exact = x.dtype == torch.float32 and chip.large
    return "ieee" if exact or chip.backend == "hip" else "tf32x3"


def low_of(x: Tensor):
    """The dtype of which two terms are accurate enough for fp32 operands that come from ``x`` (``_product``)."""
    return tl.bfloat16 if x.element_size() == 2 else None


def strides_of(name: str, x: Tensor | None) -> dict[str, int]:
    """``stride_<name>_b``, ``_t`` and ``_h`` of ``x [B, T, H, ...]``; zeros for None."""
    return {f"stride_{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate("bth")}


def score_configuration(x: Tensor, K: int, backward: bool) -> dict[str, int]:
    """All of 128 keys at once, except where ``grown`` is written too: then two blocks of keys leave room for more
    programs. 16/32 heads of 8192 tokens on an H200: 35 and 40 us forward, 55 and 52 us in the backward."""
    widest, warps = (32, 8) if x.element_size() == 4 else (64, 4) if backward else (128, 8)
    return {"BK": max(16, min(widest, triton.next_power_of_2(K))), "num_warps": warps, "num_stages": 2}


def members(group: int, most: int) -> int:
    """Value heads a program, at most ``most`` of a key head's ``group``, in parts as even as they can be."""
    return triton.cdiv(group, triton.cdiv(group, most))


def score(
    q: Tensor, k: Tensor, c_sum: Tensor, P: Tensor, table: ChunkTable, scale: float, grown: Tensor | None = None
) -> None:
    """Launches :func:`score_kernel`, which fills ``P`` and, unless it is None, ``grown``."""
    _, T, H, K = q.shape
    HV = P.shape[1]
    MEMBERS = members(HV // H, 8)
    launch(score_kernel)[(table.chunks * H * triton.cdiv(HV // H, MEMBERS),)](
        q=q, k=k, c_sum=c_sum, P=P, grown=grown, scale=scale, T=T, **table.arguments(), **strides_of("q", q),
        **strides_of("k", k), H=H, HV=HV, K=K, C=CHUNK, MEMBERS=MEMBERS, PRECISION=precision_of(q),
        **score_configuration(q, K, grown is not None),
    )  # fmt: skip


def intra_chunk(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, table: ChunkTable, scale: float, backward: bool = False
) -> IntraChunk:
    """Runs the two kernels; ``q, k`` have ``stride(-1) == 1``."""
    _, T, H, K = q.shape
    HV = g.shape[2]

    def buffer(*shape, dtype=q.dtype):
        return torch.empty((table.chunks, HV, CHUNK, *shape), dtype=dtype, device=q.device)

    low = q.element_size() == 2
    stretch = STRETCH if low and not backward else 1.0
    fp32 = partial(buffer, dtype=torch.float32)
    more = (fp32(), fp32(), buffer(CHUNK), buffer(K)) if backward else (None,) * 4
    x = IntraChunk(buffer(dtype=torch.float64), fp32(), fp32(), buffer(CHUNK), buffer(CHUNK), *more)
    rest = None
    if low:
        rest = buffer(2 * CHUNK) if backward else x.P  # not P yet
    launch(invert_kernel)[(table.chunks * HV,)](
        k=k, g=g, beta=beta, c_sum=x.c_sum, from_start=x.from_start, to_end=x.to_end, rate=x.beta,
        erasing=x.erasing, scaled=x.T, rest=rest, likeness=fp32() if low else None, work=fp32(8), inverse=x.inverse,
        T=T, **table.arguments(), **strides_of("k", k), **strides_of("g", g), **strides_of("beta", beta), H=H, HV=HV,
        K=K, BK=max(16, min(64, triton.next_power_of_2(K))), C=CHUNK, SCALE=stretch, LOW=low_of(q),
        PRECISION=precision_of(q), num_warps=1 if low else 4, num_stages=2,
    )  # fmt: skip
    score(q, k, x.c_sum, x.P, table, scale / stretch, grown=x.grown_q)
    return x
