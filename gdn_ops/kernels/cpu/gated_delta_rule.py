"""The gated delta rule on CPU: chunks of 64 tokens as batched matrix products, a segment of chunks at a time.

Inside a chunk, with ``c = cumsum(g)`` and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)      T = (I + A)^-1 diag(beta)      P = scale * (Q K^T) * D
    V' = T (V - exp(c) * (K S))                   O = scale * exp(c) * (Q S) + P V'
    S <- exp(c_C) S + K^T (exp(c_C - c) * V')

The chain from state to state is three products a chunk; everything else is done for a whole segment at once. The
inverse is a triangular solve (forward substitution), so repeated keys stay accurate; ``c`` is summed in fp64, because a
strong gate early in a chunk would otherwise cost the digits of the weak ones after it.

The backward runs the same scan, keeping the state before each chunk, ``K S`` and ``V'``, and then goes back, last chunk
first, with ``dS`` the gradient of the state after the chunk::

    dV' = P^T dO + exp(c_C - c) * (K dS)          X = inverse^T dV'          dV = beta * X
    dS <- exp(c_C) dS + (scale * exp(c) * Q)^T dO - K^T (beta * exp(c) * X)

after which the rest is products of the chunk's own: ``dP = dO V'^T``, ``dA = -X V'^T``, and what follows from them.
Source: arXiv 2412.06464, section 3.3; the gradients are checked against autograd in the tests.

A segment is as many chunks as keep its matrices in the cache: whole sequences at a time (the first form of this
file) spent half of its time moving temporaries through memory.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
# Elements of one [n, B, HV, C, C] tensor of a segment.
SEGMENT = 2**19


class _Segment(NamedTuple):
    """``n`` chunks of ``C`` tokens, state left out; all tensors ``[n, B * HV, ...]``, contiguous.

    ``q, k [C, K]``, ``v [C, V]``; ``beta, from_start, to_end [C, 1]``, ``whole [1, 1]``: the decays from the chunk's
    start to a token, from there to its end, and over all of it; ``kk`` is ``strict_lower(K K^T) * D``, and the upper
    triangle of ``D`` holds ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    D: Tensor
    kk: Tensor
    inverse: Tensor
    T: Tensor
    P: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor


class _Span(NamedTuple):
    """Where a segment lies: its first token, the number of its chunks, tokens a chunk."""

    start: int
    n: int
    C: int


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _spans(v: Tensor) -> list[_Span]:
    """Segments of whole chunks, then the tokens left over as a shorter chunk."""
    B, T, HV, _ = v.shape
    n = max(1, SEGMENT // (B * HV * CHUNK**2))
    whole = T // CHUNK
    spans = [_Span(first * CHUNK, min(n, whole - first), CHUNK) for first in range(0, whole, n)]
    return [*spans, _Span(whole * CHUNK, 1, T % CHUNK)] if T % CHUNK else spans


def _chunks_of(x: Tensor, span: _Span) -> Tensor:
    """View ``[n, B, h, C, width]`` of the span's tokens in ``x [B, T, h, width]``."""
    tokens = x[:, span.start : span.start + span.n * span.C]
    return tokens.unflatten(1, (span.n, span.C)).permute(1, 0, 3, 2, 4)


def _gather(x: Tensor, span: _Span, heads: int, dtype: torch.dtype) -> Tensor:
    """``[n, B * heads, C, width]`` of ``x [B, T, h, width]``, each head repeated ``heads // h`` times."""
    B, _, h, width = x.shape
    out = torch.empty(span.n, B, h, heads // h, span.C, width, dtype=dtype, device=x.device)
    return out.copy_(_chunks_of(x, span).unsqueeze(3)).view(span.n, B * heads, span.C, width)


def _by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B * heads, T, width]`` of ``x [B, T, h, width]``, a view where it can be; as :func:`_gather` otherwise."""
    B, T, h, width = x.shape
    x = x.to(dtype).transpose(1, 2)
    if h != heads:
        x = x.unsqueeze(2).expand(B, h, heads // h, T, width)
    return x.reshape(B * heads, T, width)


def _scatter(x: Tensor, span: _Span, out: Tensor) -> None:
    """Writes ``x [n, B * h, C, width]`` to the span's tokens of ``out [B, T, h, width]``."""
    _chunks_of(out, span).copy_(x.unflatten(1, (out.shape[0], out.shape[2])))


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _accumulate(out: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """``out += alpha * x @ y``."""
    out.flatten(0, 1).baddbmm_(x.flatten(0, 1), y.flatten(0, 1), alpha=alpha)
    return out


def _row_dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _per_key_head(x: Tensor, heads: int) -> Tensor:
    """View ``[n, heads, C, K]`` of ``q`` or ``k`` repeated for the value heads."""
    return x.unflatten(1, (heads, -1))[:, :, 0]


def _group(x: Tensor, heads: int) -> Tensor:
    """View ``[n, heads, HV // H, ...]`` of ``[n, B * HV, ...]``, with ``heads`` the number ``B * H``."""
    return x.unflatten(1, (heads, -1))


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


def _intra_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, span: _Span) -> _Segment:
    dtype, HV, heads = _compute_dtype(q), v.shape[2], q.shape[0] * q.shape[2]
    q, k, v = (_gather(x, span, HV, dtype) for x in (q, k, v))
    beta = _gather(beta[..., None], span, HV, dtype)
    c = _gather(g[..., None], span, HV, torch.float64).cumsum(2)
    end = c[:, :, -1:]
    D = (c - c.mT).tril_().to(dtype).exp_()
    k_h, q_h = _per_key_head(k, heads), _per_key_head(q, heads)
    kk = (_product(k_h, k_h.mT).tril_(-1).unsqueeze(2) * _group(D, heads)).flatten(1, 2)
    P = (_product(q_h, k_h.mT).tril_().mul_(scale).unsqueeze(2) * _group(D, heads)).flatten(1, 2)
    inverse = _inverse((kk * beta).flatten(0, 1)).view_as(kk)
    return _Segment(
        q, k, v, beta, D, kk, inverse, T=inverse * beta.mT, P=P,
        from_start=c.exp().to(dtype), to_end=(end - c).exp().to(dtype), whole=end.exp().to(dtype),
    )  # fmt: skip


def _scan(x: _Segment, states: Tensor) -> tuple[Tensor, Tensor]:
    """Fills ``states [n + 1, B * HV, K, V]`` from the first; returns what was read, ``K S``, and written, ``V'``."""
    read, written = torch.empty_like(x.v), torch.empty_like(x.v)
    for i in range(x.v.shape[0]):
        torch.bmm(x.k[i], states[i], out=read[i])
        missing = torch.addcmul(x.v[i], read[i], x.from_start[i], value=-1)
        torch.bmm(x.T[i], missing, out=written[i])
        after = torch.mul(states[i], x.whole[i], out=states[i + 1])
        after.baddbmm_(x.k[i].mT, torch.mul(written[i], x.to_end[i], out=missing))
    return read, written


def _start(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(_compute_dtype(q))
    return q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=_compute_dtype(q))


def _sequences(cu_seqlens: Tensor) -> list[tuple[int, slice]]:
    bounds = cu_seqlens.tolist()
    return [(n, slice(a, b)) for n, (a, b) in enumerate(pairwise(bounds))]


def _one(state: Tensor | None, n: int) -> Tensor | None:
    return None if state is None else state[n : n + 1]


def _forward(run, q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    """Applies ``run`` to the batch, or to each packed sequence in turn."""
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is None:
        o, state = run(q, k, v, g, beta, _start(q, v, initial_state), scale)
    else:
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        state = q.new_empty(cu_seqlens.numel() - 1, *state_shape, dtype=_compute_dtype(q))
        for n, tokens in _sequences(cu_seqlens):
            parts = [x[:, tokens] for x in (q, k, v, g, beta)]
            o[:, tokens], state[n : n + 1] = run(*parts, _start(q, v, _one(initial_state, n)), scale)
    if not output_final_state:
        state = state.new_empty(0, *state_shape)
    elif initial_state is not None and state.data_ptr() == initial_state.data_ptr():
        state = state.clone()
    return o, state.contiguous()


def _chunk_dense(q, k, v, g, beta, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    if v.shape[1] == 1:
        return _recurrent_dense(q, k, v, g, beta, S, scale)
    shape, S = S.shape, S.flatten(0, 1)
    for span in _spans(v):
        x = _intra_chunk(q, k, v, g, beta, scale, span)
        states = S.new_empty(span.n + 1, *S.shape)
        states[0] = S
        _, written = _scan(x, states)
        inside = _product(x.q, states[:-1]).mul_(x.from_start * scale)
        _scatter(_accumulate(inside, x.P, written), span, o)
        S = states[-1]
    return o, S.clone().view(shape)


def _recurrent_dense(q, k, v, g, beta, S, scale):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return o, S
    HV, dtype = v.shape[2], _compute_dtype(q)
    q, k, v = (_by_head(x, HV, dtype) for x in (q, k, v))
    beta, decay = (_by_head(x[..., None], HV, dtype) for x in (beta, g))
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
    return _forward(_chunk_dense, q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state)


def recurrent_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return _forward(_recurrent_dense, q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state)


def _reverse_scan(x: _Segment, do: Tensor, do_decayed: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor]:
    """Fills ``dstates [n + 1, B * HV, K, V]`` from its last row; returns ``K dS`` and ``X``."""
    read, X = torch.empty_like(x.v), torch.empty_like(x.v)
    decayed_beta = x.beta * x.from_start
    for i in reversed(range(x.v.shape[0])):
        torch.bmm(x.k[i], dstates[i + 1], out=read[i])
        dwritten = torch.bmm(x.P[i].mT, do[i]).addcmul_(read[i], x.to_end[i])
        torch.bmm(x.inverse[i].mT, dwritten, out=X[i])
        before = torch.mul(dstates[i + 1], x.whole[i], out=dstates[i]).baddbmm_(x.q[i].mT, do_decayed[i])
        before.baddbmm_(x.k[i].mT, torch.mul(X[i], decayed_beta[i], out=dwritten), alpha=-1)
    return read, X


def _segment_gradients(x: _Segment, do, dstates, states, read, written, scale, heads) -> tuple[Tensor, ...]:
    """Gradients of the segment's q, k ``[n, B * H, C, K]``, v, g and beta ``[n, B * HV, C, .]``; fills ``dstates``."""
    do_decayed = do * (x.from_start * scale)
    dread, X = _reverse_scan(x, do, do_decayed, dstates)
    S, dS = states, dstates[1:]
    dq = _product(do_decayed, S.mT)
    dc = _row_dot(dq, x.q)
    dk = _accumulate(_product(written * x.to_end, dS.mT), X * (x.beta * x.from_start), S.mT, alpha=-1)
    dfrom_start = _row_dot(X, read).mul_(x.from_start)
    dlog_end = _row_dot(written, dread).mul_(x.to_end)
    dP, dA = _product(do, written.mT), _product(X, written.mT).neg_()
    dA_kk = dA * x.kk
    dbeta = _row_dot(X, x.v) - dfrom_start + dA_kk.sum(-1, keepdim=True)
    dlog_D = dA_kk.mul_(x.beta).addcmul_(dP, x.P)
    dc += dlog_D.sum(-1, keepdim=True) - dlog_D.sum(-2).unsqueeze(-1) - x.beta * dfrom_start - dlog_end
    dc[:, :, -1] += dlog_end.sum(2) + (S * dS).sum((-1, -2)).unsqueeze(-1) * x.whole.squeeze(-1)
    dg = dc.flip(2).cumsum(2).flip(2)

    def over_group(grad: Tensor) -> Tensor:
        return _group(grad, heads).sum(2)

    dqk = over_group(dP.mul_(x.D)).tril_().mul_(scale)
    dkk = over_group(dA.mul_(x.D).mul_(x.beta)).tril_(-1)
    k_h, q_h = _per_key_head(x.k, heads), _per_key_head(x.q, heads)
    dq = _accumulate(over_group(dq), dqk, k_h)
    dk = _accumulate(_accumulate(over_group(dk), dqk.mT, q_h), dkk + dkk.mT, k_h)
    return dq, dk, X * x.beta, dg, dbeta


def _backward_dense(do, dfinal_state, q, k, v, g, beta, initial_state, scale) -> tuple[Tensor, ...]:
    S = _start(q, v, initial_state)
    dS = torch.zeros_like(S) if dfinal_state is None else dfinal_state.to(S.dtype)
    if v.numel() == 0:
        return (*(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)), dS.clone())
    spans, shape, heads = _spans(v), S.shape, q.shape[0] * q.shape[2]
    chunks = sum(span.n for span in spans)
    states = S.new_empty(chunks + 1, *S.flatten(0, 1).shape)
    states[0] = S.flatten(0, 1)
    forward, first = [], 0
    for span in spans:
        x = _intra_chunk(q, k, v, g, beta, scale, span)
        forward.append((x, *_scan(x, states[first : first + span.n + 1])))
        first += span.n
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
    wide = [*grads[:3], *(x[..., None] for x in grads[3:])]
    dS = dS.flatten(0, 1)
    for span in reversed(spans):
        x, read, written = forward.pop()
        first -= span.n
        dstates = dS.new_empty(span.n + 1, *dS.shape)
        dstates[-1] = dS
        do_segment = _gather(do, span, v.shape[2], S.dtype)
        some = _segment_gradients(x, do_segment, dstates, states[first : first + span.n], read, written, scale, heads)
        for out, grad in zip(wide, some):
            _scatter(grad, span, out)
        dS = dstates[0]
    return (*grads, dS.clone().view(shape))


def chunk_backward(do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale) -> tuple[Tensor, ...]:
    if cu_seqlens is None:
        *grads, dS = _backward_dense(do, dfinal_state, q, k, v, g, beta, initial_state, scale)
    else:
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
        dS = q.new_empty(cu_seqlens.numel() - 1, v.shape[2], q.shape[3], v.shape[3], dtype=_compute_dtype(q))
        for n, tokens in _sequences(cu_seqlens):
            parts = [x[:, tokens] for x in (q, k, v, g, beta)]
            *some, dS[n : n + 1] = _backward_dense(
                do[:, tokens], _one(dfinal_state, n), *parts, _one(initial_state, n), scale
            )
            for whole, part in zip(grads, some):
                whole[:, tokens] = part
    return (*grads, dS if initial_state is not None else dS.new_empty(0, *dS.shape[1:]))


def pool_slots(state: Tensor, state_indices: Tensor | None, N: int) -> Tensor:
    """The slot of each sequence, -1 for padding; raises IndexError outside ``[-1, P)``."""
    P = state.shape[0]
    slots = torch.arange(N) if state_indices is None else state_indices.long()
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= P):
        raise IndexError(f"state_indices must lie in [-1, {P}), got values from {slots.min()} to {slots.max()}")
    return slots


def recurrent_update_(q, k, v, g, beta, state, state_indices, cu_seqlens, scale) -> Tensor:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    slots = pool_slots(state, state_indices, N)
    real = slots >= 0
    initial_state = state[slots.clamp(min=0)].to(_compute_dtype(q))
    o, final = recurrent_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, True)
    state[slots[real]] = final[real].to(state.dtype)
    if cu_seqlens is None:
        o[~real] = 0
    else:
        o[:, ~real.repeat_interleave(cu_seqlens.diff().long())] = 0
    return o
