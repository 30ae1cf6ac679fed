"""The gated delta rule on CPU: chunks of 64 tokens as batched matrix products, one small loop over chunks.

Inside a chunk, with ``c = cumsum(g)`` and ``D_ij = exp(c_i - c_j)`` for ``i >= j`` (else 0)::

    A = strict_lower(diag(beta) (K K^T) * D)      T = (I + A)^-1 diag(beta)
    U = T V         W = T (exp(c) * K)            P = scale * (Q K^T) * D
    V' = U - W S    O = scale * (exp(c) * Q) S + P V'
    S <- exp(c_C) S + (exp(c_C - c) * K)^T V'

Everything without ``S`` is computed for all chunks at once; the loop holds four products a chunk. The inverse is a
triangular solve (forward substitution), so repeated keys stay accurate; ``c`` is summed in fp64, because a strong gate
early in a chunk would otherwise cost the digits of the weak ones after it. The backward recomputes all of this and
keeps only the state before each chunk. Source: arXiv 2412.06464, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


class _Chunks(NamedTuple):
    """What a chunk needs besides the state; leading dims ``[B, HV, NT]``, ``C`` tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    D: Tensor
    kk: Tensor
    A: Tensor
    inverse: Tensor
    T: Tensor
    U: Tensor
    W: Tensor
    P: Tensor
    q_decayed: Tensor
    k_decayed: Tensor
    k_to_end: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _to_chunks(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, T, h, ...]`` to ``[B, heads, NT, C, ...]``, repeating grouped heads and padding the tail with zeros."""
    x = x.to(dtype)
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    padding = -x.shape[1] % CHUNK
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)).transpose(1, 2)
    return x.unflatten(2, (-1, CHUNK))


def _intra_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> _Chunks:
    dtype, HV = _compute_dtype(q), v.shape[2]
    q, k, v = (_to_chunks(x, HV, dtype) for x in (q, k, v))
    beta = _to_chunks(beta, HV, dtype)
    c = _to_chunks(g, HV, torch.float64).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    D = (c[..., :, None] - c[..., None, :]).masked_fill_(~lower, -torch.inf).exp_().to(dtype)
    from_start, to_end = c.exp().to(dtype)[..., None], (c[..., -1:] - c).exp().to(dtype)[..., None]
    whole = c[..., -1].exp().to(dtype)[..., None, None]
    kk = k @ k.mT
    A = (kk * D * beta[..., None]).tril_(-1)
    eye = torch.eye(CHUNK, dtype=dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(A + eye, eye.expand_as(A), upper=False, unitriangular=True)
    T = inverse * beta[..., None, :]
    k_decayed = k * from_start
    return _Chunks(
        q, k, v, beta, D, kk, A, inverse, T,
        U=T @ v, W=T @ k_decayed, P=(q @ k.mT) * D * scale,
        q_decayed=q * from_start * scale, k_decayed=k_decayed, k_to_end=k * to_end,
        from_start=from_start, to_end=to_end, whole=whole,
    )  # fmt: skip


def _scan(x: _Chunks, S: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Runs the chunks in order; returns outputs, states before each chunk, written values, and the final state."""
    outputs, states, written = [], [], []
    for n in range(x.q.shape[2]):
        states.append(S)
        v_new = x.U[:, :, n] - x.W[:, :, n] @ S
        outputs.append(x.q_decayed[:, :, n] @ S + x.P[:, :, n] @ v_new)
        S = x.whole[:, :, n] * S + x.k_to_end[:, :, n].mT @ v_new
        written.append(v_new)
    return torch.stack(outputs, 2), states, written, S


def _start(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(_compute_dtype(q))
    return q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=_compute_dtype(q))


def _sequences(cu_seqlens: Tensor) -> list[tuple[int, slice]]:
    bounds = cu_seqlens.tolist()
    return [(n, slice(a, b)) for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:]))]


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
    B, T, HV, V = v.shape
    if v.numel() == 0:
        return torch.empty(v.shape, dtype=v.dtype, device=v.device), S
    if T == 1:
        return _recurrent_dense(q, k, v, g, beta, S, scale)
    o, _, _, S = _scan(_intra_chunk(q, k, v, g, beta, scale), S)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2).to(v.dtype).contiguous(), S


def _recurrent_dense(q, k, v, g, beta, S, scale):
    B, T, HV, V = v.shape
    dtype = _compute_dtype(q)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    group = HV // max(q.shape[2], 1)
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q * scale, k))
    v, beta, decay = v.to(dtype), beta.to(dtype), g.to(dtype).exp()
    for t in range(T):
        S = S * decay[:, t, :, None, None]
        k_t = k[:, t, :, None, :]
        S = S + k_t.mT @ (beta[:, t, :, None, None] * (v[:, t, :, None, :] - k_t @ S))
        o[:, t] = (q[:, t, :, None, :] @ S).squeeze(2)
    return o, S


def chunk_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return _forward(_chunk_dense, q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state)


def recurrent_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state) -> tuple[Tensor, Tensor]:
    return _forward(_recurrent_dense, q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state)


def _backward_dense(do, dfinal_state, q, k, v, g, beta, initial_state, scale) -> tuple[Tensor, ...]:
    B, T, HV, V = v.shape
    S = _start(q, v, initial_state)
    dS = torch.zeros_like(S) if dfinal_state is None else dfinal_state.to(S.dtype)
    if v.numel() == 0:
        return (*(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)), dS.clone())
    x = _intra_chunk(q, k, v, g, beta, scale)
    _, states, written, _ = _scan(x, S)
    do = _to_chunks(do, HV, S.dtype)
    dstates, dwritten = [], []
    for n in reversed(range(x.q.shape[2])):
        dv_new = x.P[:, :, n].mT @ do[:, :, n] + x.k_to_end[:, :, n] @ dS
        dstates.append(dS)
        dwritten.append(dv_new)
        dS = x.whole[:, :, n] * dS + x.q_decayed[:, :, n].mT @ do[:, :, n] - x.W[:, :, n].mT @ dv_new
    S, v_new = torch.stack(states, 2), torch.stack(written, 2)
    dS_after, dU = torch.stack(dstates[::-1], 2), torch.stack(dwritten[::-1], 2)

    dq_decayed, dP, dk_to_end, dW = do @ S.mT, (do @ v_new.mT).tril_(), v_new @ dS_after.mT, -(dU @ S.mT)
    dT = dU @ x.v.mT + dW @ x.k_decayed.mT
    dv, dk_decayed = x.T.mT @ dU, x.T.mT @ dW
    dA = -(x.inverse.mT @ (dT * x.beta[..., None, :]) @ x.inverse.mT).tril_(-1)
    dkk = dA * x.D
    dbeta = (dT * x.inverse).sum(-2) + (dkk * x.kk).sum(-1)
    dkk = dkk * x.beta[..., None]
    dqk = dP * x.D * scale
    dq = dqk @ x.k + dq_decayed * x.from_start * scale
    dk = dqk.mT @ x.q + (dkk + dkk.mT) @ x.k + dk_decayed * x.from_start + dk_to_end * x.to_end

    dlog_D = dA * x.A + dP * x.P
    dlog_end = (dk_to_end * x.k_to_end).sum(-1)
    dc = dlog_D.sum(-1) - dlog_D.sum(-2) + (dk_decayed * x.k_decayed + dq_decayed * x.q_decayed).sum(-1) - dlog_end
    dc[..., -1] += dlog_end.sum(-1) + (S * dS_after * x.whole).sum((-1, -2))
    dg = dc.flip(-1).cumsum(-1).flip(-1)

    def tokens(grad: Tensor, like: Tensor) -> Tensor:
        grad = grad.flatten(2, 3)[:, :, :T].transpose(1, 2)
        if grad.shape[2] != like.shape[2]:
            grad = grad.unflatten(2, (like.shape[2], -1)).sum(3)
        return grad.to(like.dtype).contiguous()

    return tokens(dq, q), tokens(dk, k), tokens(dv, v), tokens(dg, g), tokens(dbeta, beta), dS.contiguous()


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
