"""Everything of a chunk that does not need the state, on the GPU; the first two kernels of forward and backward.

With ``c = cumsum(g)`` inside a chunk of ``C = 64`` tokens and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)        inverse = (I + A)^-1
    U = inverse (beta * V)     W = inverse (beta * exp(c) * K)     P = scale * (Q K^T) * D

**invert_kernel**, one warp a (chunk, value head). The chunk is four blocks of 16 tokens: the ten lower blocks of ``A``
are computed one by one, so that none has to be cut out of a larger tile. The four on the diagonal are inverted by
forward substitution in fp32, the others by block substitution (``I_20 = -I_22 (A_20 I_00 + A_21 I_10)`` and so on),
with products of fp32 accuracy: repeated keys make ``A`` anything but small. Also written: ``c`` (fp64: a strong gate
must not cost the digits of the weak ones after it), ``from_start = exp(c)`` and ``to_end = exp(c_C - c)``.

**wup_kernel**, two warps a (chunk, value head): the three products, tile by tile. The backward asks for ``E = P^T dO``
in place of ``P``, which it has no other use for.

Buffers between kernels are ``[B, HV, T, ...]``, contiguous and indexed by token, so packed sequences need no table of
their own.

Sources: the chunk form, arXiv 2412.06464, section 3.3; the blockwise inverse, flash-linear-attention's ``solve_tril``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_of
from gdn_ops.kernels.triton.launch import launch

# Below this a gate is an exact zero in fp64 too; clamping keeps -inf and 1e30 out of the sums.
_WEAKEST = tl.constexpr(-1000.0)


@triton.jit
def _block(kk, beta_i, c_i, c_j):
    return kk * beta_i[:, None] * tl.exp((c_i[:, None] - c_j[None, :]).to(tl.float32))


@triton.jit
def _diagonal_block(kk, beta, c):
    rows = tl.arange(0, 16)
    strict = rows[:, None] > rows[None, :]
    D = tl.exp(tl.where(strict, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    return tl.where(strict, kk * beta[:, None] * D, 0.0)


@triton.jit
def _invert_16(A):
    """``(I + A)^-1`` of a strictly lower 16 x 16 block, row by row."""
    rows = tl.arange(0, 16)
    inverse = -A
    for i in range(2, 16):
        row = tl.sum(tl.where((rows == i)[:, None], -A, 0.0), axis=0)
        row += tl.sum(row[:, None] * inverse, axis=0)
        inverse = tl.where((rows == i)[:, None], row[None, :], inverse)
    return inverse + tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)


@triton.jit
def _store_16(inverse, block, i: tl.constexpr, j: tl.constexpr, length, C: tl.constexpr):
    rows = i * 16 + tl.arange(0, 16)
    columns = j * 16 + tl.arange(0, 16)
    block = block.to(inverse.dtype.element_ty)
    tl.store(inverse + rows[:, None] * C + columns[None, :], block, mask=(rows < length)[:, None])


@triton.jit
def _store_decay(c_sum, from_start, to_end, c, total, rows, length):
    tl.store(c_sum + rows, c, mask=rows < length)
    tl.store(from_start + rows, tl.exp(c.to(tl.float32)), mask=rows < length)
    tl.store(to_end + rows, tl.exp((total - c).to(tl.float32)), mask=rows < length)


@triton.jit
def invert_kernel(
    k,
    g,
    beta,
    c_sum,
    from_start,
    to_end,
    inverse,
    cu_seqlens,
    chunk_offsets,
    T,
    N,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of(program // HV, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    k += b * stride_k_b + begin * stride_k_t + hv // (HV // H) * stride_k_h
    g += b * stride_g_b + begin * stride_g_t + hv * stride_g_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    here = (b * HV + hv) * T + begin
    c_sum += here
    from_start += here
    to_end += here
    inverse += here * C

    r0 = tl.arange(0, 16)
    r1 = 16 + r0
    r2 = 32 + r0
    r3 = 48 + r0
    g0 = tl.load(g + r0 * stride_g_t, mask=r0 < length, other=0.0).to(tl.float64)
    g1 = tl.load(g + r1 * stride_g_t, mask=r1 < length, other=0.0).to(tl.float64)
    g2 = tl.load(g + r2 * stride_g_t, mask=r2 < length, other=0.0).to(tl.float64)
    g3 = tl.load(g + r3 * stride_g_t, mask=r3 < length, other=0.0).to(tl.float64)
    g0 = tl.where(g0 < _WEAKEST, _WEAKEST, g0)
    g1 = tl.where(g1 < _WEAKEST, _WEAKEST, g1)
    g2 = tl.where(g2 < _WEAKEST, _WEAKEST, g2)
    g3 = tl.where(g3 < _WEAKEST, _WEAKEST, g3)
    end0 = tl.sum(g0, axis=0)
    end1 = end0 + tl.sum(g1, axis=0)
    end2 = end1 + tl.sum(g2, axis=0)
    total = end2 + tl.sum(g3, axis=0)
    c0 = tl.cumsum(g0, axis=0)
    c1 = tl.cumsum(g1, axis=0) + end0
    c2 = tl.cumsum(g2, axis=0) + end1
    c3 = tl.cumsum(g3, axis=0) + end2
    _store_decay(c_sum, from_start, to_end, c0, total, r0, length)
    _store_decay(c_sum, from_start, to_end, c1, total, r1, length)
    _store_decay(c_sum, from_start, to_end, c2, total, r2, length)
    _store_decay(c_sum, from_start, to_end, c3, total, r3, length)
    beta0 = tl.load(beta + r0 * stride_beta_t, mask=r0 < length, other=0.0).to(tl.float32)
    beta1 = tl.load(beta + r1 * stride_beta_t, mask=r1 < length, other=0.0).to(tl.float32)
    beta2 = tl.load(beta + r2 * stride_beta_t, mask=r2 < length, other=0.0).to(tl.float32)
    beta3 = tl.load(beta + r3 * stride_beta_t, mask=r3 < length, other=0.0).to(tl.float32)

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

    i00 = _invert_16(_diagonal_block(kk00, beta0, c0))
    i11 = _invert_16(_diagonal_block(kk11, beta1, c1))
    i22 = _invert_16(_diagonal_block(kk22, beta2, c2))
    i33 = _invert_16(_diagonal_block(kk33, beta3, c3))
    a10 = _block(kk10, beta1, c1, c0)
    a20 = _block(kk20, beta2, c2, c0)
    a21 = _block(kk21, beta2, c2, c1)
    a30 = _block(kk30, beta3, c3, c0)
    a31 = _block(kk31, beta3, c3, c1)
    a32 = _block(kk32, beta3, c3, c2)
    i10 = -tl.dot(i11, tl.dot(a10, i00, input_precision=PRECISION), input_precision=PRECISION)
    i21 = -tl.dot(i22, tl.dot(a21, i11, input_precision=PRECISION), input_precision=PRECISION)
    i32 = -tl.dot(i33, tl.dot(a32, i22, input_precision=PRECISION), input_precision=PRECISION)
    x = tl.dot(a20, i00, input_precision=PRECISION)
    x = tl.dot(a21, i10, x, input_precision=PRECISION)
    i20 = -tl.dot(i22, x, input_precision=PRECISION)
    x = tl.dot(a31, i11, input_precision=PRECISION)
    x = tl.dot(a32, i21, x, input_precision=PRECISION)
    i31 = -tl.dot(i33, x, input_precision=PRECISION)
    x = tl.dot(a30, i00, input_precision=PRECISION)
    x = tl.dot(a31, i10, x, input_precision=PRECISION)
    x = tl.dot(a32, i20, x, input_precision=PRECISION)
    i30 = -tl.dot(i33, x, input_precision=PRECISION)

    zero = tl.zeros([16, 16], dtype=tl.float32)
    _store_16(inverse, i00, 0, 0, length, C)
    _store_16(inverse, zero, 0, 1, length, C)
    _store_16(inverse, zero, 0, 2, length, C)
    _store_16(inverse, zero, 0, 3, length, C)
    _store_16(inverse, i10, 1, 0, length, C)
    _store_16(inverse, i11, 1, 1, length, C)
    _store_16(inverse, zero, 1, 2, length, C)
    _store_16(inverse, zero, 1, 3, length, C)
    _store_16(inverse, i20, 2, 0, length, C)
    _store_16(inverse, i21, 2, 1, length, C)
    _store_16(inverse, i22, 2, 2, length, C)
    _store_16(inverse, zero, 2, 3, length, C)
    _store_16(inverse, i30, 3, 0, length, C)
    _store_16(inverse, i31, 3, 1, length, C)
    _store_16(inverse, i32, 3, 2, length, C)
    _store_16(inverse, i33, 3, 3, length, C)


@triton.jit
def wup_kernel(
    q,
    k,
    v,
    do,
    beta,
    c_sum,
    inverse,
    W,
    U,
    P,
    E,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    N,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_do_b,
    stride_do_t,
    stride_do_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``do`` None: writes ``P``; else ``E``."""
    program = tl.program_id(0)
    hv = (program % HV).to(tl.int64)
    b, begin, length = chunk_of(program // HV, T, N, cu_seqlens, chunk_offsets, C)
    if length == 0:
        return
    h = hv // (HV // H)
    q += b * stride_q_b + begin * stride_q_t + h * stride_q_h
    k += b * stride_k_b + begin * stride_k_t + h * stride_k_h
    v += b * stride_v_b + begin * stride_v_t + hv * stride_v_h
    beta += b * stride_beta_b + begin * stride_beta_t + hv * stride_beta_h
    here = (b * HV + hv) * T + begin
    rows = tl.arange(0, C)
    real = rows < length
    c = tl.load(c_sum + here + rows, mask=real, other=0.0)
    beta_c = tl.load(beta + rows * stride_beta_t, mask=real, other=0.0).to(tl.float32)
    inverse_cc = tl.load(inverse + here * C + rows[:, None] * C + rows[None, :], mask=real[:, None], other=0.0)

    qk = tl.zeros([C, C], dtype=tl.float32)
    factor = beta_c * tl.exp(c.to(tl.float32))
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        mask = real[:, None] & (columns < K)[None, :]
        q_ck = tl.load(q + rows[:, None] * stride_q_t + columns[None, :], mask=mask, other=0.0)
        k_ck = tl.load(k + rows[:, None] * stride_k_t + columns[None, :], mask=mask, other=0.0)
        qk = tl.dot(q_ck, tl.trans(k_ck), qk, input_precision=PRECISION)
        k_ck = (k_ck.to(tl.float32) * factor[:, None]).to(W.dtype.element_ty)
        w_ck = tl.dot(inverse_cc, k_ck, input_precision=PRECISION)
        tl.store(W + here * K + rows[:, None] * K + columns[None, :], w_ck.to(W.dtype.element_ty), mask=mask)
    lower = (rows[:, None] >= rows[None, :]) & real[:, None]
    D = tl.exp(tl.where(lower, c[:, None] - c[None, :], float("-inf")).to(tl.float32))
    p_cc = tl.where(lower, qk * D * scale, 0.0).to(W.dtype.element_ty)
    if do is None:
        tl.store(P + here * C + rows[:, None] * C + rows[None, :], p_cc, mask=real[:, None])
    else:
        do += b * stride_do_b + begin * stride_do_t + hv * stride_do_h

    for start in range(0, V, BV):
        columns = start + tl.arange(0, BV)
        mask = real[:, None] & (columns < V)[None, :]
        out = here * V + rows[:, None] * V + columns[None, :]
        v_cv = tl.load(v + rows[:, None] * stride_v_t + columns[None, :], mask=mask, other=0.0)
        v_cv = (v_cv.to(tl.float32) * beta_c[:, None]).to(U.dtype.element_ty)
        u_cv = tl.dot(inverse_cc, v_cv, input_precision=PRECISION)
        tl.store(U + out, u_cv.to(U.dtype.element_ty), mask=mask)
        if do is not None:
            do_cv = tl.load(do + rows[:, None] * stride_do_t + columns[None, :], mask=mask, other=0.0)
            e_cv = tl.dot(tl.trans(p_cc), do_cv, input_precision=PRECISION)
            tl.store(E + out, e_cv.to(E.dtype.element_ty), mask=mask)


class IntraChunk(NamedTuple):
    """``[B, HV, T, ...]`` buffers of one call: ``P`` in the forward, ``E`` in the backward."""

    c_sum: Tensor
    from_start: Tensor
    to_end: Tensor
    inverse: Tensor
    W: Tensor
    U: Tensor
    P: Tensor | None
    E: Tensor | None


def precision_of(x: Tensor) -> str:
    """How fp32 operands are multiplied: exactly for fp32 inputs, three TF32 products for the inverse of others.

    Exact products of wide keys need 180 KiB of shared memory; chips with less multiply fp32 inputs by TF32 too. On
    Hopper they may not: ``wup_kernel`` with 64 rows of fp32 by three TF32 products reads out of bounds there (Triton
    3.6, K = V = 128), though the values at K = V = 64 were good to 4e-7.
    """
    chip = chip_of(x)
    exact = x.dtype == torch.float32 and chip.shared_memory >= 200_000
    return "ieee" if exact or chip.backend == "hip" else "tf32x3"


def strides_of(name: str, x: Tensor | None) -> dict[str, int]:
    """``stride_<name>_b``, ``_t`` and ``_h`` of ``x [B, T, H, ...]``; zeros for None."""
    return {f"stride_{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate("bth")}


def wup_configuration(x: Tensor, K: int, V: int) -> dict[str, int]:
    """Two warps are also the fastest here (H200, 16/32 heads, 8192 tokens: both kernels .219 ms against .250).

    fp32 operands by 64 columns take 112 KiB of shared memory and spill 8 KB a thread.
    """
    widest, warps = (64, 2) if x.element_size() == 2 else (32, 8)
    BK, BV = (max(16, min(widest, triton.next_power_of_2(width))) for width in (K, V))
    return {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": 2}


def intra_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, table: ChunkTable, scale: float,
    do: Tensor | None = None,
) -> IntraChunk:  # fmt: skip
    """Runs the two kernels; ``q, k, v, do`` have ``stride(-1) == 1``. With ``do`` it is for the backward."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]

    def buffer(*shape, dtype=q.dtype):
        return torch.empty((B, HV, T, *shape), dtype=dtype, device=q.device)

    x = IntraChunk(
        buffer(dtype=torch.float64), buffer(dtype=torch.float32), buffer(dtype=torch.float32), buffer(CHUNK),
        buffer(K), buffer(V), buffer(CHUNK) if do is None else None, None if do is None else buffer(V),
    )  # fmt: skip
    shape = {"T": T, "H": H, "HV": HV, "K": K, "C": CHUNK, "PRECISION": precision_of(q), **table.arguments()}
    shape |= {**strides_of("k", k), **strides_of("beta", beta)}
    launch(invert_kernel)[(table.chunks * HV,)](
        k=k, g=g, beta=beta, c_sum=x.c_sum, from_start=x.from_start, to_end=x.to_end, inverse=x.inverse,
        **strides_of("g", g), BK=max(16, min(64, triton.next_power_of_2(K))),
        num_warps=1 if q.element_size() == 2 else 4, num_stages=2, **shape,
    )  # fmt: skip
    launch(wup_kernel)[(table.chunks * HV,)](
        q=q, k=k, v=v, do=do, beta=beta, c_sum=x.c_sum, inverse=x.inverse, W=x.W, U=x.U, P=x.P, E=x.E, scale=scale,
        **strides_of("q", q), **strides_of("v", v), **strides_of("do", do),
        V=V, **wup_configuration(q, K, V), **shape,
    )  # fmt: skip
    return x
