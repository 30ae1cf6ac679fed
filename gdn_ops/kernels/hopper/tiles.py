"""What the kernels for Hopper share: sizes of tiles, pieces of kernels, and descriptors of tensors for the copy engine.

Scores ``P = scale (Q K^T) * D`` of a chunk are made in ``PARTS``, each with its own columns, by as many warpgroups or
one after the other by one, and left in shared memory. ``D = exp(c_i - c_j)`` comes from sums in two fp32 terms and in
units of log2: differences of fp64 are slow.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gdn_ops.kernels.triton.chunk_table import CHUNK

BK = 128
BV = 64  # columns of a warpgroup


def _products(width: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


# A warpgroup's products of BK and of CHUNK columns, the left operands made of such, and what one column has.
OF_K, OF_C = gl.constexpr(_products(BK)), gl.constexpr(_products(CHUNK))
LEFT_K, LEFT_C = (
    gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_products(n), k_width=2)) for n in (BK, CHUNK)
)
ALONG_C = gl.constexpr(gl.SliceLayout(0, _products(CHUNK)))


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def piece_of(
    item, T, SEGMENT, HV: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BV: gl.constexpr, since=0, until=None
):  # fmt: skip
    """Row of the batch, value head and first of ``BV`` columns of an item, the first chunk and the number of chunks;
    then the segment, counted over all sequences, and the chunks of a sequence. Of every sequence only those from
    ``since`` to ``until`` count, all unless given."""
    NV: gl.constexpr = (V + BV - 1) // BV
    segment = item // (NV * HV)
    NT = (T + C - 1) // C
    if until is None:
        until = NT
    parts = (until - since + SEGMENT - 1) // SEGMENT
    first = since + segment % parts * SEGMENT
    return segment // parts, item // NV % HV, item % NV * BV, first, gl.minimum(SEGMENT, until - first), segment, NT


@gluon.jit
def chunk_of(index, since, of_since, again):
    """The chunk of a sequence that is the ``index``-th of those which a call takes (:class:`Chunks`)."""
    return gl.where(index < of_since, since + index, again + index - of_since)


@gluon.jit
def last_of(row):
    """The last number of a row in shared memory. A load from memory would be waited for at the next fence."""
    C: gl.constexpr = row.shape[1]
    return gl.sum(row.reshape([C]).slice(C - 1, 1).load(ALONG_C), 0)


@gluon.jit
def hidden(x):
    """A number whose origin the compiler does not see, so that it does not keep what follows from it in registers from
    one use to the next."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def state_tile(first, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """Offsets in a state ``[K, V]`` of a tile ``[BV, BK]``, and what of it exists."""
    in_v = hidden(first) + gl.arange(0, BV, gl.SliceLayout(1, OF_K))
    in_k = gl.arange(0, BK, gl.SliceLayout(0, OF_K))
    return in_k[None, :] * V + in_v[:, None], (in_v < V)[:, None] & (in_k < K)[None, :]


@gluon.jit
def transformed(v_s, t_s, stage):
    """Starts ``V^T T^T``."""
    C: gl.constexpr = v_s.shape[3]
    BV: gl.constexpr = v_s.shape[4]
    none = gl.zeros([BV, C], gl.float32, OF_C)
    v_vc = v_s.index(stage).reshape([C, BV]).permute((1, 0))
    return warpgroup_mma(v_vc, t_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def likeness(q_s, k_s, stage, PARTS: gl.constexpr, part: gl.constexpr):
    """Starts a part's columns of ``Q K^T``."""
    C: gl.constexpr = k_s.shape[3]
    BK: gl.constexpr = k_s.shape[4]
    WIDTH: gl.constexpr = C // PARTS
    of_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    none = gl.zeros([C, WIDTH], gl.float32, of_p)
    k_kj = k_s.index(stage).reshape([C, BK]).slice(part * WIDTH, WIDTH).permute((1, 0))
    return warpgroup_mma(q_s.index(stage).reshape([C, BK]), k_kj, none, use_acc=False, is_async=True)


@gluon.jit
def decays(c_s, stage, score_scale, C: gl.constexpr, PARTS: gl.constexpr, part: gl.constexpr):
    WIDTH: gl.constexpr = C // PARTS
    of_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    along_i: gl.constexpr = gl.SliceLayout(1, of_p)
    along_j: gl.constexpr = gl.SliceLayout(0, of_p)
    sums = c_s.index(stage).reshape([2 * C])
    high_i = sums.slice(0, C).load(along_i)
    low_i = sums.slice(C, C).load(along_i) + score_scale
    high_j = sums.slice(part * WIDTH, WIDTH).load(along_j)
    low_j = sums.slice(C + part * WIDTH, WIDTH).load(along_j)
    return exp2((high_i[:, None] - high_j[None, :]) + (low_i[:, None] - low_j[None, :]))


@gluon.jit
def scores(qk_cj, D_cj, part: gl.constexpr, dtype: gl.constexpr):
    """A part's columns of ``P``."""
    C: gl.constexpr = qk_cj.shape[0]
    WIDTH: gl.constexpr = qk_cj.shape[1]
    rows = gl.arange(0, C, gl.SliceLayout(1, qk_cj.type.layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, qk_cj.type.layout))
    lower = rows[:, None] >= hidden(part * WIDTH) + columns[None, :]
    return gl.where(lower, qk_cj * D_cj, 0.0).to(dtype)


@gluon.jit
def keep_scores(P_cj, p_cc, part: gl.constexpr):
    """Leaves them in their place in ``P``."""
    WIDTH: gl.constexpr = P_cj.shape[1]
    p_cc.slice(part * WIDTH, WIDTH, 1).store(P_cj)
    fence_async_shared()


def in_keys(k: Tensor, v: Tensor) -> int:
    """Of how many members of a key head (its value heads, 128 columns of each one after the other) V' is left in dq and
    dk, until these are known: one of each, where it fits."""
    members = v.shape[2] // k.shape[2] * (v.shape[3] // BK)
    return min(2, members) if k.shape[3] == BK else 0


class Squares(NamedTuple):
    """Matrices ``[., HV, C, C]`` of the ``each`` chunks from ``since`` on of every sequence."""

    x: Tensor
    since: int
    each: int


class Chunks(NamedTuple):
    """Which chunks of every sequence a call takes: ``of_since`` from ``since`` on and the others from ``again`` on,
    ``count`` in all."""

    since: int
    of_since: int
    again: int
    count: int


def chunks_between(since: int, until: int) -> Chunks:
    return Chunks(since, until - since, until, until - since)


def chunks_passed(since: int, until: int, chunks: int) -> Chunks:
    """Those which two walks through a sequence, one from either end, pass in their steps ``since`` to ``until``."""
    (first, end), (again, last) = sorted([(since, until), (chunks - until, chunks - since)])
    if again <= end:
        return chunks_between(first, last)
    return Chunks(first, end - first, again, end - first + last - again)


@cache
def _layout(swizzle: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


def heads(x: Tensor, width: int) -> TensorDescriptor:
    """Tiles of ``CHUNK`` tokens by ``width`` features of ``x [B, T, H, features]``."""
    B, T, H, features = x.shape
    b, t, h, _ = x.stride()
    # The stride of an axis of one is never used, and may be any number.
    strides = [b if B > 1 else 16, h if H > 1 else 16, t if T > 1 else 16, 1]
    return TensorDescriptor(x, [B, H, T, features], strides, [1, 1, CHUNK, width], _layout(128, 16, 4))


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """``rows`` rows of ``x [..., width]``, which is contiguous."""
    width = x.shape[-1]
    layout = _layout(128 if rows > 1 else 0, 8 * x.element_size(), 2)
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, width], layout)


def matrices(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of the matrices ``x [chunks, HV, rows, columns]``, which is contiguous."""
    chunks, HV, *shape = x.shape
    of_one = shape[0] * shape[1]
    return TensorDescriptor(x, [chunks * HV, *shape], [of_one, shape[1], 1], [1, rows, columns], _layout(128, 16, 3))
