"""How the chunkwise CPU kernels lay out their tensors: chunks of 64 tokens, a segment of chunks at a time.

Two layouts keep the products few and large. What belongs to a value head alone lies *by head*, ``[B, H, G, C, V]`` with
``G = HV // H``. What meets a key or a query lies *side by side*, ``[B, H, C, G, V]``, and so does the state,
``[B, H, K, G, V]``: keys or queries then read the states of a whole group in one product ``[C, K] x [K, G V]``, and
nothing is repeated for the group. Pointwise steps take one layout and leave the other behind, so that changing over
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
# Elements of one [n, B, HV, C, C] tensor of a segment, and elements of the states of one block of heads for each
# thread: a state is read and written once a chunk and should stay in the second-level cache meanwhile.
SEGMENT = 2**18
STATES = 2**17
# A log decay below this is an exact zero in fp64 too; -inf would leave differences that are not numbers, and a larger
# one would cost the sums after it digits.
WEAKEST = -1000.0


class Span(NamedTuple):
    """Where a segment lies: its first token, the number of its chunks, tokens a chunk."""

    start: int
    n: int
    C: int


def compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def spans(v: Tensor) -> list[Span]:
    """Segments of whole chunks, then the tokens left over as a shorter chunk."""
    B, T, HV, _ = v.shape
    n = max(1, SEGMENT // (B * HV * CHUNK**2))
    whole = T // CHUNK
    found = [Span(first * CHUNK, min(n, whole - first), CHUNK) for first in range(0, whole, n)]
    return [*found, Span(whole * CHUNK, 1, T % CHUNK)] if T % CHUNK else found


def head_blocks(q: Tensor, v: Tensor) -> list[tuple[slice, slice]]:
    """Key heads and their value heads, a block after the other."""
    (B, _, H, K), (HV, V) = q.shape, v.shape[2:]
    G = HV // H
    step = min(H, max(1, STATES * torch.get_num_threads() // (B * G * K * V)))
    return [(slice(h, h + step), slice(h * G, (h + step) * G)) for h in range(0, H, step)]


def chunks_of(x: Tensor, span: Span) -> Tensor:
    """View ``[n, B, h, C, width]`` of the span's tokens in ``x [B, T, h, width]``."""
    tokens = x[:, span.start : span.start + span.n * span.C]
    return tokens.unflatten(1, (span.n, span.C)).permute(1, 0, 3, 2, 4)


def by_group(x: Tensor, span: Span, H: int) -> Tensor:
    """View ``[n, B, H, G, C, width]`` of the span's tokens in ``x [B, T, HV, width]``."""
    return chunks_of(x, span).unflatten(2, (H, -1))


def across(x: Tensor) -> Tensor:
    """View of one layout as the other: by head ``[..., G, C, width]``, side by side ``[..., C, G, width]``."""
    return x.transpose(-3, -2)


def matrices(x: Tensor) -> Tensor:
    """``[N, rows, columns]`` of ``[..., rows, columns]``, for ``bmm``; a view of a contiguous ``x``."""
    return x.flatten(0, -3)


def wide(x: Tensor) -> Tensor:
    """``[B * H, rows, G * V]`` of ``[B, H, rows, G, V]``, for ``bmm``; a view of a contiguous ``x``."""
    return x.flatten(0, 1).flatten(2)


def state_in(state: Tensor, H: int) -> Tensor:
    """``[B, H, K, G, V]``, a fresh tensor, of ``[B, HV, K, V]``."""
    return across(state.unflatten(1, (H, -1))).clone(memory_format=torch.contiguous_format)


def state_out(state: Tensor) -> Tensor:
    return across(state).reshape(state.shape[0], -1, state.shape[2], state.shape[4])


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def start(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(compute_dtype(q))
    return q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))


def check_bounds(cu_seqlens: Tensor, T: int) -> list[int]:
    """``cu_seqlens`` as numbers; ValueError unless they start at 0, never fall, and end at ``T``."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected a non-decreasing list from 0 to T={T}, got {bounds}")
    return bounds


def sequences(cu_seqlens: Tensor, T: int) -> list[tuple[int, slice]]:
    return [(n, slice(a, b)) for n, (a, b) in enumerate(pairwise(check_bounds(cu_seqlens, T)))]


def one(state: Tensor | None, n: int) -> Tensor | None:
    return None if state is None else state[n : n + 1]


def by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B * heads, T, width]`` of ``x [B, T, h, width]``, a view where it can be, each head repeated ``heads // h``
    times."""
    B, T, h, width = x.shape
    x = x.to(dtype).transpose(1, 2)
    if h != heads:
        x = x.unsqueeze(2).expand(B, h, heads // h, T, width)
    return x.reshape(B * heads, T, width)


def forward(
    run: Callable, tokens: Sequence[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``o`` and the final state by ``run(*tokens, state, scale)`` on the batch, or on each packed sequence in turn.

    ``tokens`` are q, k, v and what the rule has besides, all ``[B, T, ...]``.
    """
    q, _, v, *_ = tokens
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is None:
        o, state = run(*tokens, start(q, v, initial_state), scale)
    else:
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        state = q.new_empty(cu_seqlens.numel() - 1, *state_shape, dtype=compute_dtype(q))
        for n, here in sequences(cu_seqlens, q.shape[1]):
            parts = [x[:, here] for x in tokens]
            o[:, here], state[n : n + 1] = run(*parts, start(q, v, one(initial_state, n)), scale)
    if not output_final_state:
        state = state.new_empty(0, *state_shape)
    elif initial_state is not None and state.data_ptr() == initial_state.data_ptr():
        state = state.clone()
    return o, state.contiguous()


def backward(
    run: Callable, do: Tensor, dfinal_state: Tensor | None, tokens: Sequence[Tensor], initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of ``tokens`` and of the initial state (no rows without one) by ``run(do, dS, *tokens, S, scale)``."""
    q, _, v, *_ = tokens

    def dense(do, dfinal_state, tokens, initial_state):
        S = start(tokens[0], tokens[2], initial_state)
        dS = torch.zeros_like(S) if dfinal_state is None else dfinal_state.to(S.dtype)
        dS = dS.contiguous()  # as the gradient of the initial state, which starts as its copy, has to be
        if do.numel() == 0:
            return (*(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tokens), dS.clone())
        return run(do, dS, *tokens, S, scale)

    if cu_seqlens is None:
        *grads, dS = dense(do, dfinal_state, tokens, initial_state)
    else:
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tokens]
        dS = q.new_empty(cu_seqlens.numel() - 1, v.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q))
        for n, here in sequences(cu_seqlens, q.shape[1]):
            parts = [x[:, here] for x in tokens]
            *some, dS[n : n + 1] = dense(do[:, here], one(dfinal_state, n), parts, one(initial_state, n))
            for whole, part in zip(grads, some):
                whole[:, here] = part
    return (*grads, dS if initial_state is not None else dS.new_empty(0, *dS.shape[1:]))
