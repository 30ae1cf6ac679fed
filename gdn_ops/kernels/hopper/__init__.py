"""Kernels for one chip, where the portable ones of ``kernels/triton`` leave a gap: the inverse, the scans, the maps of
segments and the gradients on Hopper.

They are written in Gluon (``triton.experimental.gluon``, part of Triton), which Inductor does not take. For their sake
a large call stays one node in the graphs of ``torch.compile`` (:func:`serves_whole`); small ones, and packages, are
made of the portable kernels, their twins.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import triton
from torch import Tensor

from gdn_ops.kernels.batch_invariance import is_batch_invariant
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable
from gdn_ops.kernels.triton.launch import is_traced

# The widest values whose gradients here have run on the chip. They are written for all multiples of 128; wider ones
# have the portable kernels until they have run.
WIDEST_SEEN = 512
# Columns of values that a program of the narrow scan takes; the other one takes twice as many.
NARROW = 64
# Chunks of the shortest part of a sequence whose scan and inverse overlap: a part costs the start of a kernel.
SHORTEST_PART = 32
# The same of the backward's scans, whose steps take longer, and most parts of a half of their way. Where one program
# has so many multiprocessors or more, segments are faster: with 8 heads of 128 columns, not with 16.
SHORTEST_STEPS, MOST_PARTS, FEWEST_PROGRAMS = 16, 3, 3
# Bytes of S and dS of a call from which on these are spared, and parts of the second half of the way, of the shortest
# length or longer, that take turns in the same memory. Each part is two kernels more to start.
LEAST_TO_SPARE, PARTS_TO_SPARE = 1 << 28, 4
# Tokens times heads from which on a call is left whole: the GPU then takes some .1 ms forward and .3 ms backward. To
# start a backward's kernels a host took .8 to 1.2 ms, which the rest of a layer has to hide. An estimate.
TOKENS_TO_PAY = 1 << 16


@cache
def has_gluon() -> bool:
    """In the form that the tests have seen: it is an experiment of Triton's, which the next version may change."""
    return (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7)


def is_for(x: Tensor) -> bool:
    """Whether the GPU that holds ``x`` is the chip, and Triton the version, that these kernels are for."""
    chip = chip_of(x)
    return x.is_cuda and (chip.backend, chip.arch) == ("cuda", 90) and has_gluon()


def _is_copied(x: Tensor) -> bool:
    """Whether the copy engine takes ``x [B, T, H, features]``: 16-byte steps, ahead."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    steps = all(0 < stride < 2**31 and stride % (16 // x.element_size()) == 0 for stride in strides)
    return x.stride(-1) == 1 and steps and x.data_ptr() % 16 == 0


def _fits(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, gradients: bool = False) -> bool:
    """Dense batches of 16-bit heads with 64 < K <= 128 and V > 64, for gradients a multiple of 128, on a Hopper GPU.
    Packed sequences would need the copies of a chunk to end inside a tensor; batch-invariant calls keep one kernel for
    both.
    """
    return (
        is_for(q)
        and not is_batch_invariant()
        and cu_seqlens is None
        and q.element_size() == 2
        and 64 < q.shape[3] <= 128
        and v.shape[3] > 64
        and not (gradients and (v.shape[3] % 128 or v.shape[3] > WIDEST_SEEN))
    )


def serves(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, gradients: bool = False
) -> bool:  # fmt: skip
    """Whether the kernels here may take the place of the portable ones, outside compilers."""
    return (
        not is_traced()
        and _fits(q, v, cu_seqlens, gradients)
        and scale > 0
        and v.shape[0] * triton.cdiv(v.shape[1], CHUNK) * v.shape[2] * CHUNK < 2**31
        and all(map(_is_copied, (q, k, v)))
    )


def _hint(size) -> int:
    """An axis's length, or what it was in the call that is traced: no guard comes of it."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None) or 0


def serves_whole(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, gradients: bool) -> bool:
    """Whether ``torch.compile`` had better leave a call as it is, since these kernels take it. The host pays for it: it
    starts each of them by Triton's own launcher."""
    B, T, HV, V = v.shape
    return (
        all(isinstance(width, int) for width in (q.shape[3], V))
        and _fits(q, v, cu_seqlens, gradients)
        and math.prod(map(_hint, (B, T, HV))) >= TOKENS_TO_PAY
    )


def serves_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, cu_seqlens: Tensor | None
) -> bool:  # fmt: skip
    """Whether ``hopper.gradients`` may: its tiles have 128 columns of values."""
    return serves(q, k, v, scale, cu_seqlens, gradients=True) and _is_copied(do)


def programs_of(v: Tensor, pieces: int) -> int:
    """Of the narrow scan, or one way of the backward's, for so many sequences or segments."""
    return pieces * v.shape[2] * triton.cdiv(v.shape[3], NARROW)


def has_room(q: Tensor, v: Tensor, table: ChunkTable) -> bool:
    """Whether all programs of the narrow scan run at once: then the time of one is what counts, else that of all."""
    return programs_of(v, table.segments) <= chip_of(q).multiprocessors


def _doubling(chunks: int, shortest: int, most: int) -> list[int]:
    """Lengths of at most so many parts, each twice as long as the one before it, the first ``shortest`` or longer where
    there are more than one."""
    number = min(most, max(1, (chunks // shortest + 1).bit_length() - 1))
    ends = [chunks * (2**i - 1) // (2**number - 1) for i in range(number + 1)]
    return [end - start for start, end in pairwise(ends)]


def parts(q: Tensor, v: Tensor, table: ChunkTable) -> list[int]:
    """Chunks of the parts in which the narrow scan takes every sequence: while half of the multiprocessors scan a part,
    the others can do the inverse of the next. One part where they are less than half."""
    chunks = table.chunks // q.shape[0]
    free = table.segment is None and 2 * programs_of(v, table.segments) <= chip_of(q).multiprocessors
    return _doubling(chunks, SHORTEST_PART, chunks) if free else [chunks]


def steps_of_parts(q: Tensor, v: Tensor) -> list[int]:
    """Steps of the parts in which the backward's scans take whole sequences, one part where segments or the chip's size
    are better. In the first half of its steps the inverse of the next part runs beside a part, in the second the
    gradients of the part before it."""
    chunks, programs = triton.cdiv(v.shape[1], CHUNK), 2 * programs_of(v, v.shape[0])
    if not FEWEST_PROGRAMS * programs > chip_of(q).multiprocessors >= 2 * programs:
        return [chunks]
    before, after = (_doubling(half, SHORTEST_STEPS, MOST_PARTS) for half in (chunks // 2, chunks - chunks // 2))
    return [*before[:-1], before[-1] + after[0], *after[1:]]


def spares_states(k: Tensor, v: Tensor) -> bool:
    B, T, HV, V = v.shape
    chunks = triton.cdiv(T, CHUNK)
    states = 2 * B * chunks * HV * V * k.shape[3] * k.element_size()
    return states >= LEAST_TO_SPARE and chunks >= 2 * PARTS_TO_SPARE * SHORTEST_STEPS
