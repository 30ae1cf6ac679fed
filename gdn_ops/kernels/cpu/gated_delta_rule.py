"""The gated delta rule on CPU: chunks of 64 tokens as batched matrix products, a segment of chunks at a time.

Inside a chunk, with ``c = cumsum(g)`` and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)      T = (I + A)^-1 diag(beta)      P = scale * (Q K^T) * D
    V' = T (V - exp(c) * (K S))                   O = scale * exp(c) * (Q S) + P V'
    S <- exp(c_C) S + K^T (exp(c_C - c) * V')

The chain from state to state is a few products a chunk; everything else is done for a whole segment at once. The
inverse is a triangular solve (forward substitution), so repeated keys stay accurate; ``c`` is summed in fp64, because a
strong gate early in a chunk would otherwise cost the digits of the weak ones after it.

The backward runs the same scan, keeping the state before each chunk, ``K S``, ``Q S`` and ``V'``, and then goes back,
last chunk first, with ``dS`` the gradient of the state after the chunk::

    dV' = P^T dO + exp(c_C - c) * (K dS)          X = inverse^T dV'          dV = beta * X
    L = [-beta * exp(c) * X; scale * exp(c) * dO]     d[K; Q] = L S^T + ...      dS <- exp(c_C) dS + [K; Q]^T L

after which the rest is products of the chunk's own: ``dP = dO V'^T``, ``dA = -X V'^T``, and what follows from them.
Source: arXiv 2412.06464, section 3.3; the gradients are checked against autograd in the tests.

The layouts, *by head* and *side by side*, are those of ``chunks.py``: keys stacked on queries, ``[2C, K]``, read the
states of a whole group in one product ``[2C, K] x [K, G V]``.
"""

from __future__ import annotations

from functools import partial
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
    sequences,
    spans,
    state_in,
    state_out,
    wide,
)


class _Segment(NamedTuple):
    """``n`` chunks of ``C`` tokens, state and values left out; a leading ``n`` everywhere, gone in :meth:`chunk`.

    ``kq [n, B * H, 2C, K]`` is keys stacked on queries. By head, ``[n, B, H, G, ...]``: ``beta, from_start, to_end
    [C, 1]`` and ``whole [1, 1]``, the decays from the chunk's start to a token, from there to its end, and over all of
    it; ``D, inverse, T, P [C, C]``, and ``kk``, which is ``strict_lower(K K^T) * D``.
    """

    kq: Tensor
    beta: Tensor
    D: Tensor
    kk: Tensor
    inverse: Tensor
    T: Tensor
    P: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    def chunk(self, i: int) -> _Segment:
        return _Segment(*(x[i] for x in self))


def _inverse(A: Tensor) -> Tensor:
    """``(I + A)^-1`` of strictly lower ``A [N, C, C]``: substitution in blocks of 16, then block by block.

    Substitution alone stays on one core and takes 1.8 ms for 128 matrices of 64; this takes 0.9 ms.
    """
    N, C, _ = A.shape
    if C <= 16 or C % 2:
        eye = torch.eye(C, dtype=A.dtype, device=A.device)
        return torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)
    half = C // 2
    below = A[:, half:, :half]
    first, second = _inverse(torch.cat([A[:, :half, :half], A[:, half:, half:]])).split(N)
    out = torch.zeros_like(A)
    out[:, :half, :half], out[:, half:, half:] = first, second
    out[:, half:, :half] = torch.bmm(torch.bmm(second, below), first).neg_()
    return out


def _intra_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, span: Span) -> _Segment:
    dtype, (B, _, H, K), C = compute_dtype(q), q.shape, span.C
    kq = torch.empty(span.n, B, H, 2 * C, K, dtype=dtype, device=q.device)
    kq[..., :C, :], kq[..., C:, :] = chunks_of(k, span), chunks_of(q, span)
    beta = by_group(beta[..., None], span, H).to(dtype, memory_format=torch.contiguous_format)
    c = by_group(g[..., None], span, H).to(torch.float64, memory_format=torch.contiguous_format)
    c = c.clamp(min=WEAKEST).cumsum(-2)
    end = c[..., -1:, :]
    D = (c - c.mT).tril_().to(dtype).exp_()
    pairs = matrices(kq)
    pairs = torch.bmm(pairs, pairs[:, :C].mT).view(span.n, B, H, 1, 2 * C, C)
    kk, P = pairs[..., :C, :].tril(-1) * D, pairs[..., C:, :].tril().mul_(scale) * D
    inverse = _inverse(matrices(kk * beta)).view_as(kk)
    return _Segment(
        kq.flatten(1, 2), beta, D, kk, inverse, T=inverse * beta.mT, P=P,
        from_start=c.exp().to(dtype), to_end=(end - c).exp().to(dtype), whole=end.exp().to(dtype),
    )  # fmt: skip


def _write(x: _Segment, v: Tensor, S: Tensor, after: Tensor, read: Tensor, missing: Tensor, written: Tensor) -> None:
    """One chunk: from its state ``S`` fills ``read [B, H, 2C, G, V]`` with ``[K; Q] S``, ``written`` with ``V'``
    (``missing``, as ``v`` by head, is room for what lies between) and ``after`` with the next state (may be ``S``)."""
    C = written.shape[-2]
    torch.bmm(x.kq, wide(S), out=wide(read))
    torch.addcmul(v, across(read[:, :, :C]), x.from_start, value=-1, out=missing)
    torch.bmm(matrices(x.T), matrices(missing), out=matrices(written))
    decayed = missing.view(*missing.shape[:2], C, -1, missing.shape[-1])
    torch.mul(across(written), across(x.to_end), out=decayed)
    torch.mul(S, across(x.whole), out=after)
    wide(after).baddbmm_(x.kq[:, :C].mT, wide(decayed))


def _chunk_dense(q, k, v, g, beta, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    if v.shape[1] == 1:
        return _recurrent_dense(q, k, v, g, beta, S, scale)
    final = torch.empty_like(S)
    for keys, values in head_blocks(q, v):
        parts = q[:, :, keys], k[:, :, keys], *(x[:, :, values] for x in (v, g, beta, o))
        final[:, values] = _chunk_heads(*parts, S[:, values], scale)
    return o, final


def _chunk_heads(q, k, v, g, beta, o, S, scale) -> Tensor:
    """Fills ``o`` and returns the final state."""
    H, S = q.shape[2], state_in(S, q.shape[2])
    for span in spans(v):
        segment = _intra_chunk(q, k, v, g, beta, scale, span)
        values, outputs = by_group(v, span, H), by_group(o, span, H)
        missing, written = (S.new_empty(values.shape[1:]) for _ in range(2))
        read = S.new_empty(*S.shape[:2], 2 * span.C, *S.shape[3:])
        for i in range(span.n):
            x = segment.chunk(i)
            _write(x, values[i], S, S, read, missing, written)
            inside = torch.bmm(matrices(x.P), matrices(written)).view_as(written)
            torch.addcmul(inside, across(read[:, :, span.C :]), x.from_start, value=scale, out=outputs[i])
    return state_out(S)


def _recurrent_dense(q, k, v, g, beta, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    HV, dtype = v.shape[2], compute_dtype(q)
    q, k, v = (by_head(x, HV, dtype) for x in (q, k, v))
    beta, decay = (by_head(x[..., None], HV, dtype) for x in (beta, g))
    shape, S, outputs = S.shape, S.flatten(0, 1), []
    tokens = zip(*(x.split(1, dim=1) for x in (q * scale, k, v, beta, decay.exp())))
    for q_t, k_t, v_t, beta_t, decay_t in tokens:
        # The first product makes the state that is then updated in place; the caller's stays as it is.
        S = S.mul_(decay_t) if outputs else S * decay_t
        S.baddbmm_(k_t.mT, (v_t - torch.bmm(k_t, S)).mul_(beta_t))
        outputs.append(torch.bmm(q_t, S))
    o.copy_(torch.cat(outputs, 1).unflatten(0, (-1, HV)).transpose(1, 2))
    return o, S.view(shape)


def chunk_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return forward(_chunk_dense, (q, k, v, g, beta), initial_state, cu_seqlens, scale, output_final_state)


def recurrent_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return forward(_recurrent_dense, (q, k, v, g, beta), initial_state, cu_seqlens, scale, output_final_state)


class _Kept(NamedTuple):
    """What the forward leaves for the backward: a segment's chunks, the state before each ``[n, B, H, K, G, V]``,
    ``[K; Q] S`` side by side and ``V'`` by head."""

    segment: _Segment
    states: Tensor
    read: Tensor
    written: Tensor


def _forward_kept(q, k, v, g, beta, S, scale) -> list[_Kept]:
    H, kept = q.shape[2], []
    for span in spans(v):
        segment, values = _intra_chunk(q, k, v, g, beta, scale, span), by_group(v, span, H)
        states = S.new_empty(span.n + 1, *S.shape)
        states[0] = S
        read, written = S.new_empty(span.n, *S.shape[:2], 2 * span.C, *S.shape[3:]), S.new_empty(values.shape)
        missing = S.new_empty(values.shape[1:])
        for i in range(span.n):
            _write(segment.chunk(i), values[i], states[i], states[i + 1], read[i], missing, written[i])
        S = states[-1]
        kept.append(_Kept(segment, states[:-1], read, written))
    return kept


def _segment_gradients(kept: _Kept, v: Tensor, do: Tensor, dS: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of the segment's ``[K; Q]``, as ``kq``, and of v, g, beta by head; ``dS`` goes back in place."""
    x, states, read, written = kept
    n, C = written.shape[0], written.shape[-2]
    Xdo = dS.new_empty(*v.shape[:-2], 2 * C, v.shape[-1])
    X, do = Xdo[..., :C, :], Xdo[..., C:, :].copy_(do)
    left, dkq = torch.empty_like(read), torch.empty_like(x.kq)
    torch.mul(across(do), across(x.from_start * scale), out=left[..., C:, :, :])
    minus_beta, dlog_end, dlog_whole = x.beta * -x.from_start, [], []
    decayed, dread = (torch.empty_like(left[0, :, :, :C], memory_format=torch.contiguous_format) for _ in range(2))
    for i in reversed(range(n)):
        chunk = x.chunk(i)
        torch.bmm(chunk.kq[:, :C], wide(dS), out=wide(dread))
        dwritten = torch.bmm(matrices(chunk.P).mT, matrices(do[i])).view_as(written[i])
        dwritten.addcmul_(across(dread), chunk.to_end)
        torch.bmm(matrices(chunk.inverse).mT, matrices(dwritten), out=matrices(X[i]))
        torch.mul(across(X[i]), across(minus_beta[i]), out=left[i, :, :, :C])
        torch.mul(across(written[i]), across(chunk.to_end), out=decayed)
        torch.bmm(wide(left[i]), wide(states[i]).mT, out=dkq[i])
        dkq[i, :, :C].baddbmm_(wide(decayed), wide(dS).mT)
        dlog_end.append(across(row_dot(decayed, dread)))
        dlog_whole.append(across((states[i] * dS).sum((-3, -1), keepdim=True)))
        wide(dS.mul_(across(chunk.whole))).baddbmm_(chunk.kq.mT, wide(left[i]))
    dlog_end, dlog_whole = (torch.stack(parts[::-1]) for parts in (dlog_end, dlog_whole))
    dA, dP = torch.bmm(matrices(Xdo), matrices(written).mT).view(*v.shape[:-2], 2 * C, C).split(C, -2)
    dA_kk = dA.neg_() * x.kk
    missing = torch.addcmul(v, across(read[..., :C, :, :]), x.from_start, value=-1)
    dbeta = row_dot(X, missing) + dA_kk.sum(-1, keepdim=True)
    # No gate stands between a token and itself, and none before a token in its way to the end: left out, not added and
    # taken away again, so that strong gates, beside which nothing else is left, get gradients of full accuracy.
    dlog_D = dA_kk.mul_(x.beta).addcmul_(dP, x.P).tril_(-1)
    dlog_start = row_dot(left, read)
    dc = dlog_D.sum(-1, keepdim=True) - dlog_D.sum(-2).unsqueeze(-1)
    dc += across(dlog_start[..., :C, :, :] + dlog_start[..., C:, :, :])
    dg = dc.flip(-2).cumsum(-2).flip(-2) + dlog_whole * x.whole
    dg[..., 1:, :] += dlog_end.cumsum(-2)[..., :-1, :]
    # The gradient of [K K^T; Q K^T], as one matrix that meets [K; Q].
    dpairs = torch.zeros(n, x.kq.shape[1], 2 * C, 2 * C, dtype=dS.dtype, device=dS.device)
    dkk = dA.mul_(x.D).mul_(x.beta).sum(3).tril_(-1).flatten(1, 2)
    torch.mul(dP.mul_(x.D).sum(3).tril_().flatten(1, 2), scale, out=dpairs[..., C:, :C])
    torch.add(dkk, dkk.mT, out=dpairs[..., :C, :C])
    dpairs[..., :C, C:] = dpairs[..., C:, :C].mT
    matrices(dkq).baddbmm_(matrices(dpairs), matrices(x.kq))
    return dkq, X * x.beta, dg, dbeta


def _backward_dense(do, dS, q, k, v, g, beta, S, scale) -> tuple[Tensor, ...]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
    dstate = dS.clone()
    for keys, values in head_blocks(q, v):
        own = [
            (*(x[:, :, keys] for x in some[:2]), *(x[:, :, values] for x in some[2:]))
            for some in ((q, k, v, g, beta), grads)
        ]
        dstate[:, values] = _backward_heads(*own[0], do[:, :, values], S[:, values], dS[:, values], scale, own[1])
    return (*grads, dstate)


def _backward_heads(q, k, v, g, beta, do, S, dS, scale, grads) -> Tensor:
    """Fills ``grads``, those of q, k, v, g and beta, and returns the initial state's."""
    B, _, H, _ = q.shape
    dS, kept = state_in(dS, H), _forward_kept(q, k, v, g, beta, state_in(S, H), scale)
    dq, dk, dv, dg, dbeta = grads
    for span in reversed(spans(v)):
        dkq, *some = _segment_gradients(kept.pop(), by_group(v, span, H), by_group(do, span, H), dS, scale)
        dkq = dkq.unflatten(1, (B, H))
        chunks_of(dk, span).copy_(dkq[..., : span.C, :])
        chunks_of(dq, span).copy_(dkq[..., span.C :, :])
        for out, grad in zip((dv, dg[..., None], dbeta[..., None]), some):
            by_group(out, span, H).copy_(grad)
    return state_out(dS)


def chunk_backward(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale) -> tuple[Tensor, ...]:
    return backward(_backward_dense, do, dfinal_state, (q, k, v, g, beta), initial_state, cu_seqlens, scale)


def pool_slots(state: Tensor, indices: Tensor | None, N: int, name: str = "state_indices") -> Tensor:
    """The slots that ``indices`` name, ``0..N-1`` without them, -1 for padding; IndexError outside ``[-1, P)``."""
    P = state.shape[0]
    slots = torch.arange(N, device=state.device) if indices is None else indices.long()
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= P):
        raise IndexError(f"{name} must lie in [-1, {P}), got values from {slots.min()} to {slots.max()}")
    return slots


def taken(state: Tensor, slots: Tensor) -> Tensor:
    """What lies in ``slots`` of the pool; anything for padding."""
    if state.shape[0] == 0:
        return state.new_zeros(slots.shape[0], *state.shape[1:])
    return state.index_select(0, slots.clamp(min=0))


def _recurrent_kept(pool, q, k, v, g, beta, slots, S, scale):
    """Token by token, like :func:`_recurrent_dense`; the state after each is left in its slot of ``pool``."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for t in range(v.shape[1]):
        now = slice(t, t + 1)
        o[:, now], S = _recurrent_dense(*(x[:, now] for x in (q, k, v, g, beta)), S, scale)
        kept = slots[:, t] >= 0
        pool[slots[kept, t]] = S[kept].to(pool.dtype)
    return o, S


def _padding(q: Tensor, slots: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Tokens ``[B, T]`` of sequences on no slot."""
    if cu_seqlens is None:
        return (slots < 0)[:, None].expand(q.shape[:2])
    padding = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    for n, here in sequences(cu_seqlens, q.shape[1]):
        padding[:, here] = slots[n] < 0
    return padding


def recurrent_update_(q, k, v, g, beta, state, state_indices, token_state_indices, cu_seqlens, scale) -> Tensor:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    T, end = q.shape[1], q.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])  # tokens of no sequence follow
    slots, run = pool_slots(state, state_indices, N), _recurrent_dense
    tokens = tuple(x[:, :end] for x in (q, k, v, g, beta))
    padding, real = _padding(tokens[0], slots, cu_seqlens), slots >= 0
    if token_state_indices is not None:
        token_slots = pool_slots(state, token_state_indices[:, :end], N, "token_state_indices")
        tokens, run = (*tokens, token_slots.masked_fill(padding, -1)), partial(_recurrent_kept, state)
    in_order = state_indices is None and token_state_indices is None
    # Whole rows: index_select and index_copy_ are faster than indexing.
    initial_state = state[:N] if in_order else taken(state, slots)
    o, final = forward(run, tokens, initial_state.to(compute_dtype(q)), cu_seqlens, scale, True)
    if in_order:
        state[:N].copy_(final)
    elif token_state_indices is None:
        if not bool(real.all()):
            slots, final = slots[real], final[real]
        state.index_copy_(0, slots, final.to(state.dtype))
    o[padding] = 0
    return o if o.shape[1] == T else torch.cat([o, o.new_zeros(o.shape[0], T - o.shape[1], *o.shape[2:])], dim=1)
