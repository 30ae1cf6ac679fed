"""Groups of a large backward, done one after the other in the same memory.

Both scans of the backward write ``S`` before each chunk, ``dS`` after it and ``V'``, five times the bytes of v where
K = V = 128, and nothing but the gradient kernels of the same rows and heads reads them. So rows of the batch can take
turns, and so can the key heads of a row, each with all of its value heads. As long as the programs of the scans need as
many waves in all, one program a multiprocessor, this takes no longer: 4 rows of 32 value heads of 128 columns are 256
programs, two waves on 132 multiprocessors, and two groups of 2 rows are one each.
"""

from __future__ import annotations

import math
from functools import cache

import triton
from torch import Tensor

from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_forward import scan_configuration
from gdn_ops.kernels.triton.chunk_table import CHUNK, chunk_table
from gdn_ops.kernels.triton.launch import is_traced
from gdn_ops.kernels.triton.segments import segment_length

# Bytes of S, dS and V' of a group: of all groups of a call in the mean at least so many, for the host takes 1.3 ms to
# start each, by when a GPU should have work for longer; and at most so many of any, where there are rows and heads to
# part, also at the price of time and of sequences cut into segments, which round otherwise. Infinite: groups cost the
# GPU no time.
SMALLEST, LARGEST = 1 << 30, math.inf


def _lengths(whole: int, parts: int) -> list[int]:
    """As even as they can be, the longer ones first."""
    length, longer = divmod(whole, parts)
    return [length + 1] * longer + [length] * (parts - longer)


def _slices(whole: int, parts: int) -> list[slice]:
    slices, stop = [], 0
    for length in _lengths(whole, parts):
        slices.append(slice(stop, stop + length))
        stop += length
    return slices


def groups(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, by_heads: bool) -> list[tuple[slice, slice]]:
    """Rows of the batch and key heads of each group; one group, the whole call, where there is nothing to win.

    As many as need no more waves than the whole call and leave its sequences whole or in the same segments, then more
    while one is larger than ``LARGEST``. Heads are parted where ``by_heads`` says so, equally, and each row for itself.
    Packed sequences stay together, and so do calls that a compiler records.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    whole = [(slice(0, B), slice(0, H))]
    if is_traced() or cu_seqlens is not None:
        return whole
    size = B * triton.cdiv(T, CHUNK) * HV * V * (2 * K + CHUNK) * q.element_size()
    most = size // SMALLEST
    # Numbers of parts, of rows first, of which no smaller one gives parts as short.
    cuts = [(rows, 1) for rows in range(1, min(B, most) + 1) if (rows - 1) * triton.cdiv(B, rows) < B]
    if by_heads:
        cuts += [(B, heads) for heads in range(2, min(H, most // B) + 1) if H % heads == 0]
    if len(cuts) < 2:
        return whole

    @cache
    def scans(rows: int, heads: int) -> tuple[int | None, int]:
        """Chunks a segment, and waves of programs, of so many rows and key heads."""
        some_q, some_v = q[:rows, :, :heads], v[:rows, :, : heads * (HV // H)]
        segment = segment_length(some_q, some_v, None, ways=2)
        pairs = chunk_table(rows, T, None, segment).heads(some_v.shape[2], ways=2)
        programs = pairs * triton.cdiv(V, scan_configuration(q, K, V, pairs)["BV"])
        return segment, triton.cdiv(programs, chip_of(q).multiprocessors)

    segment, waves = scans(B, H)

    def is_free(rows: int, heads: int) -> bool:
        if rows * heads > waves:
            return False
        made = [scans(length, H // heads) for length in _lengths(B, rows)]
        return heads * sum(n for _, n in made) <= waves and all(cut == segment for cut, _ in made)

    first = next(i for i in reversed(range(len(cuts))) if is_free(*cuts[i]))
    fits = (cut for cut in cuts[first:] if size // B * triton.cdiv(B, cut[0]) // cut[1] <= LARGEST)
    rows, heads = next(fits, cuts[-1])
    return [(some, key_heads) for some in _slices(B, rows) for key_heads in _slices(H, heads)]
