"""Gated linear attention (Mamba2's rule) on CPU: chunks of 64 tokens as batched matrix products.

Inside a chunk, with ``c = cumsum(g)`` and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    P = scale * (Q K^T) * D          O = scale * exp(c) * (Q S) + P V          S <- exp(c_C) S + K^T (exp(c_C - c) * V)

Nothing is erased, so what a chunk writes does not depend on the state: the chain from state to state is one multiply
and add a chunk, and every product is done for a whole segment of chunks at once. Layouts, and what is said there of the
sums of gates, are those of ``chunks.py`` and ``gated_delta_rule.py``.

The backward keeps the state before each chunk and goes back, last segment first, with ``dS`` the gradient of the state
after the chunk (``grown = scale * exp(c) * dO``, ``decayed = exp(c_C - c) * V``)::

    dV = P^T dO + exp(c_C - c) * (K dS)       dP = scale * (dO V^T) * D       dS <- exp(c_C) dS + Q^T grown
    dQ = grown S^T + dP K                     dK = decayed dS^T + dP^T Q

Source: arXiv 2405.21060, section 6; the gradients are checked against autograd in the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.kernels.cpu.chunks import (
    WEAKEST,
    Span,
    across,
    backward,
    by_group,
    by_head,
    chunks_of,
    compute_dtype,
    forward,
    head_blocks,
    matrices,
    row_dot,
    spans,
    state_in,
    state_out,
    wide,
)


class _Segment(NamedTuple):
    """``n`` chunks of ``C`` tokens: ``q, k [n * B * H, C, K]``; by head ``[n, B, H, G, ...]``: ``D, P [C, C]``, and the
    decays ``from_start, to_end [C, 1]`` and ``whole [1, 1]``; side by side ``decayed [n, B, H, C, G, V]``."""

    q: Tensor
    k: Tensor
    D: Tensor
    P: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    decayed: Tensor


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, span: Span) -> _Segment:
    dtype, H = compute_dtype(q), q.shape[2]
    q, k = (chunks_of(x, span).to(dtype).flatten(0, 2) for x in (q, k))
    c = by_group(g[..., None], span, H).to(torch.float64, memory_format=torch.contiguous_format)
    c = c.clamp(min=WEAKEST).cumsum(-2)
    end = c[..., -1:, :]
    D = (c - c.mT).tril_().to(dtype).exp_()
    P = torch.bmm(q, k.mT).tril_().mul_(scale).view(span.n, -1, H, 1, span.C, span.C) * D
    to_end = (end - c).exp().to(dtype)
    decayed = across(by_group(v, span, H).to(dtype) * to_end).contiguous()
    return _Segment(q, k, D, P, c.exp().to(dtype), to_end, end.exp().to(dtype), decayed)


def _rows(x: Tensor) -> Tensor:
    """``[n * B * H, rows, G * V]`` of ``[n, B, H, rows, G, V]``, for ``bmm``; a view of a contiguous ``x``."""
    return wide(x.flatten(0, 1))


def _states(x: _Segment, S: Tensor) -> Tensor:
    """The state before each chunk and after the last, ``[n + 1, B, H, K, G, V]``."""
    n = x.decayed.shape[0]
    states = S.new_empty(n + 1, *S.shape)
    states[0] = S
    torch.bmm(x.k.mT, _rows(x.decayed), out=_rows(states[1:]))
    for i in range(n):
        states[i + 1].addcmul_(states[i], across(x.whole[i]))
    return states


def _chunk_dense(q, k, v, g, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    if v.shape[1] == 1:
        return _recurrent_dense(q, k, v, g, S, scale)
    final = torch.empty_like(S)
    for keys, values in head_blocks(q, v):
        parts = q[:, :, keys], k[:, :, keys], *(x[:, :, values] for x in (v, g, o))
        final[:, values] = _chunk_heads(*parts, S[:, values], scale)
    return o, final


def _chunk_heads(q, k, v, g, o, S, scale) -> Tensor:
    """Fills ``o`` and returns the final state."""
    H, S = q.shape[2], state_in(S, q.shape[2])
    for span in spans(v):
        x, values = _segment(q, k, v, g, scale, span), by_group(v, span, H).to(S.dtype)
        states = _states(x, S)
        read = torch.bmm(x.q, _rows(states[:-1])).view_as(x.decayed)
        inside = torch.bmm(matrices(x.P), matrices(values)).view(values.shape)
        by_group(o, span, H).copy_(inside.addcmul_(across(read), x.from_start, value=scale))
        S = states[-1]
    return state_out(S)


def _recurrent_dense(q, k, v, g, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    HV, dtype = v.shape[2], compute_dtype(q)
    q, k, v, decay = (by_head(x, HV, dtype) for x in (q, k, v, g[..., None]))
    shape, S, outputs = S.shape, S.flatten(0, 1), []
    for q_t, k_t, v_t, decay_t in zip(*(x.split(1, dim=1) for x in (q * scale, k, v, decay.exp()))):
        # The first product makes the state that is then updated in place; the caller's stays as it is.
        S = S.mul_(decay_t) if outputs else S * decay_t
        S.baddbmm_(k_t.mT, v_t)
        outputs.append(torch.bmm(q_t, S))
    o.copy_(torch.cat(outputs, 1).unflatten(0, (-1, HV)).transpose(1, 2))
    return o, S.view(shape)


def chunk_forward(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return forward(_chunk_dense, (q, k, v, g), initial_state, cu_seqlens, scale, output_final_state)


def recurrent_forward(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return forward(_recurrent_dense, (q, k, v, g), initial_state, cu_seqlens, scale, output_final_state)


def _segment_gradients(x: _Segment, states: Tensor, v: Tensor, do: Tensor, dS: Tensor, scale: float):
    """Gradients of the segment's q and k, as they lie there, and of v and g by head; and ``dS`` before it."""
    n = x.decayed.shape[0]
    do = do.to(dS.dtype, memory_format=torch.contiguous_format)
    v = v.to(dS.dtype, memory_format=torch.contiguous_format)
    grown = across(do * (x.from_start * scale)).contiguous()
    after = dS.new_empty(n + 1, *dS.shape)  # [0]: before the first chunk
    after[n] = dS
    torch.bmm(x.q.mT, _rows(grown), out=_rows(after[:n]))
    for i in reversed(range(n)):
        after[i].addcmul_(after[i + 1], across(x.whole[i]))
    dS, after, before = after[0], after[1:], states[:-1]
    dP = torch.bmm(matrices(do), matrices(v).mT).view(x.P.shape)
    # No gate stands between a token and itself, and none before a token in its way to the end: left out, not added and
    # taken away again, so that strong gates, beside which nothing else is left, get gradients of full accuracy.
    dlog_D = (dP * x.P).tril_(-1)
    dP = dP.mul_(x.D).sum(3).tril_().mul_(scale).flatten(0, 2)
    dread = torch.bmm(x.k, _rows(after)).view_as(x.decayed)
    dv = torch.bmm(matrices(x.P).mT, matrices(do)).view_as(do).addcmul_(across(dread), x.to_end)
    dq = torch.bmm(grown.flatten(0, 2).flatten(2), _rows(before).mT).baddbmm_(dP, x.k)
    dk = torch.bmm(x.decayed.flatten(0, 2).flatten(2), _rows(after).mT).baddbmm_(dP.mT, x.q)
    dc = dlog_D.sum(-1, keepdim=True) - dlog_D.sum(-2).unsqueeze(-1)
    dc += across(row_dot(grown, torch.bmm(x.q, _rows(before)).view_as(grown)))
    dlog_end = across(row_dot(x.decayed, dread))
    dlog_whole = across((before * after).sum((-3, -1), keepdim=True))
    dg = dc.flip(-2).cumsum(-2).flip(-2) + dlog_whole * x.whole
    dg[..., 1:, :] += dlog_end.cumsum(-2)[..., :-1, :]
    return dq, dk, dv, dg, dS


def _backward_dense(do, dS, q, k, v, g, S, scale) -> tuple[Tensor, ...]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g)]
    dstate = dS.clone()
    for keys, values in head_blocks(q, v):
        own = [
            (*(x[:, :, keys] for x in some[:2]), *(x[:, :, values] for x in some[2:])) for some in ((q, k, v, g), grads)
        ]
        dstate[:, values] = _backward_heads(*own[0], do[:, :, values], S[:, values], dS[:, values], scale, own[1])
    return (*grads, dstate)


def _backward_heads(q, k, v, g, do, S, dS, scale, grads) -> Tensor:
    """Fills ``grads``, those of q, k, v and g, and returns the initial state's."""
    B, _, H, _ = q.shape
    S, dS, kept = state_in(S, H), state_in(dS, H), []
    for span in spans(v):
        segment = _segment(q, k, v, g, scale, span)
        kept.append((segment, _states(segment, S)))
        S = kept[-1][1][-1]
    dq, dk, dv, dg = grads
    for span in reversed(spans(v)):
        *some, dS = _segment_gradients(*kept.pop(), by_group(v, span, H), by_group(do, span, H), dS, scale)
        for out, grad in zip((dq, dk), some):
            chunks_of(out, span).copy_(grad.unflatten(0, (span.n, B, H)))
        for out, grad in zip((dv, dg[..., None]), some[2:]):
            by_group(out, span, H).copy_(grad)
    return state_out(dS)


def chunk_backward(do, dfinal_state, q, k, v, g, initial_state, cu_seqlens, scale) -> tuple[Tensor, ...]:
    return backward(_backward_dense, do, dfinal_state, (q, k, v, g), initial_state, cu_seqlens, scale)
