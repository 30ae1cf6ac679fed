"""The backward on Hopper: the inverse, maps of segments where there are any, both scans, the gradients.

The way forth and the way back start from the two ends of a sequence and meet. Until then every step needs the inverse
of two more chunks, and from then on it leaves two behind whose gradients can be had. So where whole sequences leave
half of the multiprocessors idle the scans go in parts (``hopper.steps_of_parts``): on that half the inverse for the
next part runs beside a part, and later the gradients of the part before it. They are kernels of one stream, each
started while the one before it still runs (programmatic dependent launch); the bits are those of one part.

A large call that leaves no multiprocessor idle goes in parts for its memory: what the first half of the steps left is
there until it is met, and the parts of the second half take turns in the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from gdn_ops.kernels import hopper
from gdn_ops.kernels.hopper import both_ways, gradients
from gdn_ops.kernels.hopper.invert import inverse_by_parts, squares
from gdn_ops.kernels.hopper.maps import maps
from gdn_ops.kernels.hopper.tiles import Squares, chunks_between, chunks_passed
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
    segment = segment_length(q, v, None, ways=2) if len(parts) == 1 else None
    table = chunk_table(B, T, None, segment)
    x, invert_some = inverse_by_parts(k, g, beta, table, backward=True)
    dg, dbeta = (torch.empty((B, T, HV), dtype=like.dtype, device=q.device) for like in (g, beta))
    written = gradients.room(k, v)
    spare = len(parts) == 1 and segment is None and hopper.spares_states(k, v)
    between = (B if spare or len(parts) > 1 else 0, HV, K, V)
    forth, back = (k.new_empty(between, dtype=torch.float32) for _ in range(2))
    met = chunks // 2  # steps until the two ways meet

    def room(steps: int) -> tuple[Tensor, Tensor]:
        states, dstates = (k.new_empty((B * steps, HV, V, K)) for _ in range(2))
        return states, dstates

    def scans(scaled: Squares, inverse: Squares, states: tuple[Tensor, Tensor]) -> Callable[..., None]:
        places = {"states": states[0], "written": written, "dq": dq, "dk": dk, "dstates": states[1], "X": dv}
        return both_ways.prepared(x, scaled, inverse, do, q, k, v, table, scale, **places)

    def gradients_of(states: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor] | None = None) -> Callable[..., None]:
        return gradients.prepared(x, do, q, k, v, *states, written, dq, dk, dv, dg, dbeta, scale, later)

    if spare:
        scaled = [squares(k, HV, 0, met), squares(k, HV, met, chunks)]
        inverse = [squares(k, HV, 0, chunks - met), squares(k, HV, chunks - met, chunks)]
        invert_some(chunks_between(0, met), scaled[0], inverse[0])
        if chunks - met > met:  # the middle one is the last for either way
            invert_some(chunks_between(met, chunks - met), scaled[1], inverse[0])
        invert_some(chunks_between(chunks - met, chunks), scaled[1], inverse[1])
        states = room(met)
        scans(scaled.pop(0), inverse.pop(), states)(
            before=before, after=after, leave=back, reached=forth, since=0, until=met, shift=0, EARLY=False
        )
        length = triton.cdiv(chunks - met, hopper.PARTS_TO_SPARE)
        later = room(length)
        scan, compute = scans(scaled[0], inverse[0], later), gradients_of(states, later)
        for since in range(met, chunks, length):
            until, last = min(since + length, chunks), since + length >= chunks
            scan(
                before=forth, after=back, leave=leave if last else back, reached=None if last else forth, since=since,
                until=until, shift=-since, EARLY=False,
            )  # fmt: skip
            compute(chunks_passed(since, until, chunks), multiprocessors, since)
        return dg, dbeta

    scaled, inverse = squares(k, HV, 0, chunks), squares(k, HV, 0, chunks)
    inverted = 0
    if segment is not None:
        inverted = chunks
        invert_some(chunks_between(0, chunks), scaled, inverse)
        segments = maps(x._replace(T=scaled.x), k, v, table, before)
        before = combine(segments, before, None, q, T, table, reverse=False)
        # M is that of the way back, too; B has been used, and its memory takes the other one.
        both_ways.reverse_maps(x, inverse, do, q, k, table, scale, enter=after, leave=segments.B)
        after = combine(segments, after, leave, q, T, table, reverse=True)
        del segments
    states = room(chunks)
    scan, compute = scans(scaled, inverse, states), gradients_of(states)
    since = 0
    for part in parts:
        until, half = since + part, min(since + part, chunks - met)
        last = until == chunks
        if inverted < half:
            invert_some(chunks_passed(inverted, half, chunks), scaled, inverse, early=since > 0)
            inverted = half
        scan(
            before=before, after=after, leave=leave if last else back, reached=None if last else forth, since=since,
            until=until, shift=0, EARLY=since > met,
        )  # fmt: skip
        before, after = forth, back
        if until > met:
            beside = 0 if last else 2 * hopper.programs_of(v, table)
            compute(chunks_passed(max(since, met), until, chunks), multiprocessors - beside)
        since = until
    return dg, dbeta
