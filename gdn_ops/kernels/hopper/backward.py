"""The backward on Hopper: the inverse, maps of segments where there are any, both scans, the gradients.

The way forth and the way back start from the two ends of a sequence and meet. Until then every step needs the inverse
of two more chunks, and from then on it leaves two behind whose gradients can be had. So where whole sequences leave
half of the multiprocessors idle the scans go in parts (``hopper.steps_of_parts``): on that half the inverse for the
next part runs beside a part, and later the gradients of the part before it. They are kernels of one stream, each
started while the one before it still runs (programmatic dependent launch); the bits are those of one part.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gdn_ops.kernels import hopper
from gdn_ops.kernels.hopper import both_ways, gradients
from gdn_ops.kernels.hopper.invert import inverse_by_parts
from gdn_ops.kernels.hopper.maps import maps
from gdn_ops.kernels.hopper.tiles import chunks_between, chunks_passed
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, chunk_table
from gdn_ops.kernels.triton.segments import combine, segment_length


def backward(
    do: Tensor, after: Tensor | None, before: Tensor | None, leave: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills ``dq, dk, dv`` and, with that of the initial state, ``leave`` (or None); gives those of g and beta.
    ``after`` is the gradient of the final state."""
    (B, T, _, K), (HV, V) = k.shape, v.shape[2:]
    chunks, multiprocessors = triton.cdiv(T, CHUNK), chip_of(q).multiprocessors
    parts = hopper.steps_of_parts(q, v)
    table = chunk_table(B, T, None, segment_length(q, v, None, ways=2) if len(parts) == 1 else None)
    # Steps until the two ways meet, and of how many more the inverse is known.
    met, inverted = chunks // 2, 0
    x, invert_some = inverse_by_parts(k, g, beta, table, backward=True)
    if table.segment is not None:
        inverted = chunks
        invert_some(chunks_between(0, chunks))
        segments = maps(x, k, v, table, before)
        before = combine(segments, before, None, q, T, table, reverse=False)
        # M is that of the way back, too; B has been used, and its memory takes the other one.
        both_ways.reverse_maps(x, do, k, table, q=q, scale=scale, enter=after, leave=segments.B)
        after = combine(segments, after, leave, q, T, table, reverse=True)
        del segments
    dg, dbeta = (torch.empty((B, T, HV), dtype=like.dtype, device=q.device) for like in (g, beta))
    states, dstates = (q.new_empty((table.chunks, HV, V, K)) for _ in range(2))
    written = gradients.room(k, v)
    # V' is where dq and dk will be, X where dv will.
    scan = both_ways.prepared(
        x, do, q, k, v, table, scale, states=states, written=written, dq=dq, dk=dk, dstates=dstates, X=dv
    )
    compute = gradients.prepared(x, do, q, k, v, states, dstates, written, dq, dk, dv, dg, dbeta, scale)
    if len(parts) > 1:
        forth, back = (k.new_empty((B, HV, K, V), dtype=torch.float32) for _ in range(2))
    since = 0
    for part in parts:
        until, half = since + part, min(since + part, chunks - met)
        last = until == chunks
        if inverted < half:
            invert_some(chunks_passed(inverted, half, chunks), early=since > 0)
            inverted = half
        if last:
            scan(before=before, after=after, leave=leave, reached=None, since=since, until=until, EARLY=since > met)
        else:
            scan(before=before, after=after, leave=back, reached=forth, since=since, until=until, EARLY=since > met)
            before, after = forth, back
        if until > met:
            beside = 0 if last else 2 * hopper.programs_of(v, table)
            compute(chunks_passed(max(since, met), until, chunks), multiprocessors - beside)
        since = until
    return dg, dbeta
