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
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gdn_ops.kernels import hopper
from gdn_ops.kernels.hopper import both_ways, gradients
from gdn_ops.kernels.hopper.invert import inverse_by_parts, squares
from gdn_ops.kernels.hopper.maps import maps
from gdn_ops.kernels.hopper.tiles import Squares, chunks_between, chunks_passed
from gdn_ops.kernels.triton.chip import chip_of
from gdn_ops.kernels.triton.chunk_table import CHUNK, ChunkTable, chunk_table
from gdn_ops.kernels.triton.intra_chunk import IntraChunk
from gdn_ops.kernels.triton.segments import combine, segment_length


class _Call(NamedTuple):
    """What the kernels of a call share. V' is where dq and dk will be, or in ``written``, X where dv will."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    table: ChunkTable
    x: IntraChunk
    invert: Callable[..., None]
    written: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return triton.cdiv(self.k.shape[1], CHUNK)

    def squares(self, since: int, until: int) -> Squares:
        return squares(self.k, self.v.shape[2], since, until)

    def states(self, steps: int) -> tuple[Tensor, Tensor]:
        """Room for S and dS of so many steps."""
        B, _, HV, V = self.v.shape
        states, dstates = (self.k.new_empty((B * steps, HV, V, self.k.shape[3])) for _ in range(2))
        return states, dstates

    def between(self) -> tuple[Tensor, Tensor]:
        """Room for both, from part to part."""
        B, _, HV, V = self.v.shape
        forth, back = (self.k.new_empty((B, HV, self.k.shape[3], V), dtype=torch.float32) for _ in range(2))
        return forth, back

    def scans(self, scaled: Squares, inverse: Squares, states: tuple[Tensor, Tensor]) -> Callable[..., None]:
        return both_ways.prepared(
            self.x, scaled, inverse, self.do, self.q, self.k, self.v, self.table, self.scale, states=states[0],
            written=self.written, dq=self.dq, dk=self.dk, dstates=states[1], X=self.dv,
        )  # fmt: skip

    def gradients(
        self, states: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor] | None = None
    ) -> Callable[..., None]:
        return gradients.prepared(
            self.x, self.do, self.q, self.k, self.v, *states, self.written, self.dq, self.dk, self.dv, self.dg,
            self.dbeta, self.scale, later,
        )  # fmt: skip


def backward(
    do: Tensor, after: Tensor | None, before: Tensor | None, leave: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills ``dq, dk, dv`` and, with that of the initial state, ``leave`` (or None); gives those of g and beta.
    ``after`` is the gradient of the final state."""
    B, T, HV, _ = v.shape
    parts = hopper.steps_of_parts(q, v)
    segment = segment_length(q, v, None, ways=2) if len(parts) == 1 else None
    table = chunk_table(B, T, None, segment)
    x, invert = inverse_by_parts(k, g, beta, table, backward=True)
    dg, dbeta = (torch.empty((B, T, HV), dtype=like.dtype, device=q.device) for like in (g, beta))
    call = _Call(do, q, k, v, scale, table, x, invert, gradients.room(k, v), dq, dk, dv, dg, dbeta)
    if segment is not None:
        _in_segments(call, before, after, leave)
    elif len(parts) == 1 and hopper.spares_states(k, v):
        _in_less_memory(call, before, after, leave)
    else:
        _beside_each_other(call, parts, before, after, leave)
    return dg, dbeta


def _in_segments(call: _Call, before: Tensor | None, after: Tensor | None, leave: Tensor | None) -> None:
    q, k, table, T = call.q, call.k, call.table, call.k.shape[1]
    whole = chunks_between(0, call.chunks)
    scaled, inverse = (call.squares(0, call.chunks) for _ in range(2))
    call.invert(whole, scaled, inverse)
    segments = maps(call.x._replace(T=scaled.x), k, call.v, table, before)
    before = combine(segments, before, None, q, T, table, reverse=False)
    # M is that of the way back, too; B has been used, and its memory takes the other one.
    both_ways.reverse_maps(call.x, inverse, call.do, q, k, table, call.scale, enter=after, leave=segments.B)
    after = combine(segments, after, leave, q, T, table, reverse=True)
    del segments
    states = call.states(call.chunks)
    call.scans(scaled, inverse, states)(
        before=before, after=after, leave=leave, reached=None, since=0, until=call.chunks, shift=0, EARLY=False
    )
    call.gradients(states)(whole, chip_of(q).multiprocessors)


def _beside_each_other(
    call: _Call, parts: list[int], before: Tensor | None, after: Tensor | None, leave: Tensor | None
) -> None:
    chunks, multiprocessors = call.chunks, chip_of(call.q).multiprocessors
    met = chunks // 2  # steps until the two ways meet
    scaled, inverse, states = call.squares(0, chunks), call.squares(0, chunks), call.states(chunks)
    scan, compute = call.scans(scaled, inverse, states), call.gradients(states)
    forth, back = call.between() if len(parts) > 1 else (None, None)
    since = inverted = 0
    for part in parts:
        until, half = since + part, min(since + part, chunks - met)
        last = until == chunks
        if inverted < half:
            call.invert(chunks_passed(inverted, half, chunks), scaled, inverse, early=since > 0)
            inverted = half
        scan(
            before=before, after=after, leave=leave if last else back, reached=None if last else forth, since=since,
            until=until, shift=0, EARLY=since > met,
        )  # fmt: skip
        before, after = forth, back
        if until > met:
            beside = 0 if last else 2 * hopper.programs_of(call.v, call.table.segments)
            compute(chunks_passed(max(since, met), until, chunks), multiprocessors - beside)
        since = until


def _in_less_memory(call: _Call, before: Tensor | None, after: Tensor | None, leave: Tensor | None) -> None:
    chunks, multiprocessors = call.chunks, chip_of(call.q).multiprocessors
    met = chunks // 2
    scaled = [call.squares(0, met), call.squares(met, chunks)]
    inverse = [call.squares(0, chunks - met), call.squares(chunks - met, chunks)]
    call.invert(chunks_between(0, met), scaled[0], inverse[0])
    if chunks - met > met:  # the middle one is the last for either way
        call.invert(chunks_between(met, chunks - met), scaled[1], inverse[0])
    call.invert(chunks_between(chunks - met, chunks), scaled[1], inverse[1])
    states, (forth, back) = call.states(met), call.between()
    # Of T and the inverse these halves are used now, and their memory is free for the states of later parts.
    scan = call.scans(scaled.pop(0), inverse.pop(), states)
    scan(before=before, after=after, leave=back, reached=forth, since=0, until=met, shift=0, EARLY=False)
    del scan
    length = triton.cdiv(chunks - met, hopper.PARTS_TO_SPARE)
    later = call.states(length)
    scan, compute = call.scans(scaled[0], inverse[0], later), call.gradients(states, later)
    for since in range(met, chunks, length):
        until, last = min(since + length, chunks), since + length >= chunks
        scan(
            before=forth, after=back, leave=leave if last else back, reached=None if last else forth, since=since,
            until=until, shift=-since, EARLY=False,
        )  # fmt: skip
        compute(chunks_passed(since, until, chunks), multiprocessors, since)
