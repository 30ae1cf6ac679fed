"""The specification: the gated delta rule, gated linear attention and the short causal convolution, token by token, in
plain torch.

Per head, with a state ``S`` of shape ``[K, V]`` (arXiv 2412.06464, eq. 10, gate in log space)::

    S_t = exp(g_t) * S_{t-1} + beta_t * k_t (v_t - exp(g_t) * S_{t-1}^T k_t)^T
    o_t = scale * S_t^T q_t

that is: decay the state, then write at key ``k_t`` the part of ``v_t`` that the state does not hold yet. Gated linear
attention (Mamba2's rule) writes all of ``v_t``. Everything else in this package is a faster way to the numbers of this
file. It runs in the dtype it is given and is differentiable by autograd, so it also defines the gradients.

Shapes: ``q, k [B, T, H, K]``; ``v, o [B, T, HV, V]`` with ``HV % H == 0`` (value head ``i`` reads key head
``i // (HV // H)``); ``g, beta [B, T, HV]``; states ``[N, HV, K, V]``. With ``cu_seqlens [N + 1]``, ``B`` is 1 and
sequence ``n`` is the tokens ``cu_seqlens[n]:cu_seqlens[n + 1]``; without it, ``N`` is ``B``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def _each_sequence(rule: Callable, tokens: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor):
    """``rule(*tokens, state)`` of every packed sequence: outputs joined along time, states along dim 0."""
    bounds, results = cu_seqlens.tolist(), []
    if len(bounds) == 1:  # no sequence: the results of an empty one, without its state
        output, state = rule(*(x[:, :0] for x in tokens), None)
        return output, state[:0]
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        results.append(rule(*(x[:, start:end] for x in tokens), state))
    outputs, states = zip(*results)
    return torch.cat(outputs, dim=1), torch.cat(states, dim=0)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above; returns ``(o [B, T, HV, V], final_state [N, HV, K, V])``.

    ``scale`` defaults to ``K ** -0.5`` and ``initial_state`` to zeros. All inputs share one floating dtype.

    Example::

        >>> q = k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> v, g, beta = torch.randn(1, 5, 4, 16), -torch.rand(1, 5, 4), torch.rand(1, 5, 4)
        >>> o, state = gated_delta_rule(q, k, v, g, beta)
        >>> o.shape, state.shape
        (torch.Size([1, 5, 4, 16]), torch.Size([1, 4, 8, 16]))
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda *parts: gated_delta_rule(*parts[:5], scale, parts[5]), (q, k, v, g, beta), initial_state, cu_seqlens
        )

    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    scale = K**-0.5 if scale is None else scale
    q_bthk = q.repeat_interleave(HV // H, dim=2) * scale
    k_bthk = k.repeat_interleave(HV // H, dim=2)
    S_bhkv = v.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        S_bhkv = S_bhkv * g[:, t, :, None, None].exp()
        stored_bhv = torch.einsum("bhk,bhkv->bhv", k_bthk[:, t], S_bhkv)
        written_bhv = beta[:, t, :, None] * (v[:, t] - stored_bhv)
        S_bhkv = S_bhkv + torch.einsum("bhk,bhv->bhkv", k_bthk[:, t], written_bhv)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_bthk[:, t], S_bhkv))
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(B, 0, HV, V)
    return o, S_bhkv


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t``; arguments and results as above, no beta.

    This is Mamba2's recurrence (arXiv 2405.21060): its C is q, its B is k, its dt * x is v, its dt * A is g.

    Example::

        >>> (q, k), v, g = torch.randn(2, 1, 5, 1, 8), torch.randn(1, 5, 4, 16), -torch.rand(1, 5, 4)
        >>> o, state = gated_linear_attention(q, k, v, g)
        >>> o.shape, state.shape
        (torch.Size([1, 5, 4, 16]), torch.Size([1, 4, 8, 16]))
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda *parts: gated_linear_attention(*parts[:4], scale, parts[4]), (q, k, v, g), initial_state, cu_seqlens
        )

    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q_bthk = q.repeat_interleave(HV // H, dim=2) * scale
    k_bthk = k.repeat_interleave(HV // H, dim=2)
    S_bhkv = v.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        written_bhkv = torch.einsum("bhk,bhv->bhkv", k_bthk[:, t], v[:, t])
        S_bhkv = S_bhkv * g[:, t, :, None, None].exp() + written_bhkv
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_bthk[:, t], S_bhkv))
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(B, 0, HV, V)
    return o, S_bhkv


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time: ``y_t = act(bias + sum_i weight[:, i] * x_{t - W + 1 + i})``.

    ``x, y [B, T, D]``, ``weight [D, W]``, ``bias [D]``. ``initial_state [N, D, W - 1]`` holds the inputs before the
    first token, oldest first (default zeros); the second result is the same window after the last token.
    ``activation`` is ``None``, ``"silu"`` or ``"swish"`` (the same thing).

    Example::

        >>> y, state = causal_conv1d(torch.randn(2, 7, 3), torch.randn(3, 4), activation="silu")
        >>> y.shape, state.shape
        (torch.Size([2, 7, 3]), torch.Size([2, 3, 3]))
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda x, state: causal_conv1d(x, weight, bias, state, activation), (x,), initial_state, cu_seqlens
        )

    B, T, D = x.shape
    W = weight.shape[1]
    before_bwd = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.transpose(1, 2)
    window_btd = torch.cat([before_bwd, x], dim=1)
    y = sum(window_btd[:, i : i + T] * weight[:, i] for i in range(W))
    if bias is not None:
        y = y + bias
    if activation in ("silu", "swish"):
        y = y * torch.sigmoid(y)
    return y, window_btd[:, T:].transpose(1, 2)
