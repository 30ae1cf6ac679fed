"""Floor 3: the functions people call. Each validates once, composes the pointwise parts in plain torch (so that a
compiler fuses them and an exporter sees them) and calls one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_ops import validation
from gdn_ops.kernels.cpu.chunks import compute_dtype
from gdn_ops.ops.gated_delta_rule import sequence_count


def rule_inputs(q, k, v, g, beta, l2norm, gate, A_log, dt_bias, beta_sigmoid, allow_neg_eigval, cu_seqlens):
    """Flags to plain tensors: normalised q and k, log decay g, and beta."""
    validation.gated_delta_rule(q, k, v, g, beta, cu_seqlens)
    if gate:
        if g is None or A_log is None:
            raise ValueError("use_gate_in_kernel: expected g (the raw gate) and A_log, got None")
        HV = v.shape[2]
        validation.state(A_log, "A_log", (HV,), q, "q")
        wide = compute_dtype(q)
        g = g.to(wide)
        if dt_bias is not None:
            validation.state(dt_bias, "dt_bias", (HV,), q, "q")
            g = g + dt_bias.to(wide)
        g = -A_log.to(wide).exp() * F.softplus(g)
    elif A_log is not None or dt_bias is not None:
        raise ValueError("A_log, dt_bias: expected None unless use_gate_in_kernel=True, got a tensor")
    g = _no_decay(v) if g is None else g
    if allow_neg_eigval and not beta_sigmoid:
        raise ValueError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")
    if beta_sigmoid:
        beta = beta.to(compute_dtype(q)).sigmoid()
        beta = beta * 2 if allow_neg_eigval else beta
    if l2norm:
        q, k = _l2norm(q), _l2norm(k)
    return q, k, g, beta


def _no_decay(v: Tensor) -> Tensor:
    return torch.zeros(v.shape[:3], dtype=compute_dtype(v), device=v.device)


def _l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.to(compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _state_shape(q, v, state_v_first):
    """Of one sequence's state, as the caller lays it out."""
    K, V = q.shape[3], v.shape[3]
    return (v.shape[2], V, K) if state_v_first else (v.shape[2], K, V)


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    try:
        if isinstance(scale, (str, bytes)):
            raise TypeError
        return float(scale)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"scale: expected a number or None, got {scale!r:.80}") from None


def _run(op, q, k, v, gates, scale, initial_state, output_final_state, state_v_first, cu_seqlens):
    """``gates`` are the operator's inputs after v: g and beta, or g alone."""
    if initial_state is not None:
        N = sequence_count(q, cu_seqlens)
        validation.state(initial_state, "initial_state", (N, *_state_shape(q, v, state_v_first)), q, "q")
        initial_state = initial_state.mT if state_v_first else initial_state
        initial_state = initial_state.to(compute_dtype(q))
    scale, output_final_state = _scale(scale, q), bool(output_final_state)
    o, final_state = op(q, k, v, *gates, initial_state, cu_seqlens, scale, output_final_state)
    if not output_final_state:
        return o, None
    return o, final_state.mT if state_v_first else final_state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule (arXiv 2412.06464, eq. 10) over whole sequences, chunk by chunk; differentiable.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]`` with ``HV % H == 0``; one dtype (fp32, bf16, fp16, fp64).
        g: log decay ``[B, T, HV]``, at most 0, any float dtype; -inf forgets all before it; ``None`` means 0
            (DeltaNet's rule).
        beta: writing strength ``[B, T, HV]``.
        scale: factor on q, default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]`` (``[N, HV, V, K]`` with ``state_v_first``), default zeros.
        output_final_state: also return the state after the last token, in fp32 (fp64 for fp64 inputs).
        use_qk_l2norm_in_kernel: divide q and k by their l2 norms (eps 1e-6 under the root).
        use_gate_in_kernel: ``g`` is raw; the decay is ``-exp(A_log) * softplus(g + dt_bias)``, both ``[HV]``.
        use_beta_sigmoid_in_kernel: ``beta`` is raw; its sigmoid is used, times 2 with ``allow_neg_eigval``.
        cu_seqlens: ``[N + 1]`` int32 or int64 bounds of sequences packed along T; then B is 1.

    Returns:
        ``(o [B, T, HV, V], final_state or None)``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example::

        >>> q, k = torch.randn(2, 1, 100, 2, 64)
        >>> v, g, beta = torch.randn(1, 100, 4, 64), -torch.rand(1, 100, 4), torch.rand(1, 100, 4)
        >>> o, state = chunk_gated_delta_rule(
        ...     q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    q, k, g, beta = rule_inputs(
        q, k, v, g, beta, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, cu_seqlens,
    )  # fmt: skip
    op = torch.ops.gdn.chunk_gated_delta_rule
    return _run(op, q, k, v, (g, beta), scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same rule token by token, for decode and short sequences; differentiable.

    Arguments, shapes, results and errors as :func:`chunk_gated_delta_rule` (which see for what it raises).

    Example::

        >>> q, k = torch.nn.functional.normalize(torch.randn(2, 1, 1, 2, 64), dim=-1)
        >>> v, g, beta = torch.randn(1, 1, 4, 64), -torch.rand(1, 1, 4), torch.rand(1, 1, 4)
        >>> state = torch.zeros(1, 4, 64, 64)
        >>> o, state = recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 1, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    q, k, g, beta = rule_inputs(
        q, k, v, g, beta, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, cu_seqlens,
    )  # fmt: skip
    op = torch.ops.gdn.recurrent_gated_delta_rule
    return _run(op, q, k, v, (g, beta), scale, initial_state, output_final_state, state_v_first, cu_seqlens)


fused_recurrent_gated_delta_rule = recurrent_gated_delta_rule


def recurrent_gated_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    token_state_indices: Tensor | None = None,
) -> Tensor:
    """Reads and writes the states in place in a pool ``state [P, HV, K, V]``; returns ``o``. Not differentiable.

    ``state_indices [N]`` (int32 or int64) is the slot of each sequence, default ``0..N-1``. ``-1`` is padding: no
    state is touched and the output is zero. Any other value outside ``[0, P)`` raises ``IndexError`` on CPU and is
    treated as padding on CUDA, where checking would stall the stream. What a slot holds after a call that names it
    twice is not defined: on CUDA its heads may even come from different sequences. Other slots are not touched by it.

    ``token_state_indices [B, T]`` (int32 or int64; packed along T like the tokens) names the slot that receives the
    state after each token, rounded to the pool's dtype; ``-1``: that state is not kept. The sequence's own slot is then
    only read, before any of its tokens writes: it stays as it is unless one of them names it, and sequences may share
    it. A padding sequence leaves no states. Values outside ``[-1, P)`` as above. Not defined: what a slot holds that
    two tokens name, and what a sequence makes of a slot that another one's token names.

    Other arguments as :func:`chunk_gated_delta_rule`.

    Example::

        >>> q, k = torch.nn.functional.normalize(torch.randn(2, 2, 1, 2, 64), dim=-1)
        >>> v, g, beta = torch.randn(2, 1, 4, 64), -torch.rand(2, 1, 4), torch.rand(2, 1, 4)
        >>> pool, slots = torch.zeros(8, 4, 64, 64), torch.tensor([5, -1], dtype=torch.int32)
        >>> o = recurrent_gated_delta_rule_(q, k, v, g, beta, pool, slots)
        >>> pool.any(-1).any(-1).any(-1).nonzero().flatten(), bool(o[1].any())
        (tensor([5]), False)

    Speculative decoding: one call verifies draft tokens and keeps the state after each; the next one goes on from that
    after the last accepted token (from slot 0, which has not changed, if there is none)::

        >>> q, k = torch.nn.functional.normalize(torch.randn(2, 1, 3, 2, 64), dim=-1)
        >>> v, g, beta = torch.randn(1, 3, 4, 64), -torch.rand(1, 3, 4), torch.rand(1, 3, 4)
        >>> pool, slots, drafts = torch.zeros(8, 4, 64, 64), torch.tensor([0]), torch.tensor([[5, 6, 7]])
        >>> o = recurrent_gated_delta_rule_(q, k, v, g, beta, pool, slots, token_state_indices=drafts)
        >>> pool.any(-1).any(-1).any(-1).nonzero().flatten()
        tensor([5, 6, 7])
        >>> accepted = 2
        >>> slots = drafts[:, accepted - 1]
        >>> slots
        tensor([6])
    """
    q, k, g, beta = rule_inputs(
        q, k, v, g, beta, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, cu_seqlens,
    )  # fmt: skip
    N = sequence_count(q, cu_seqlens)
    validation.pool(state, "state", _state_shape(q, v, state_v_first), q, "q")
    if state_indices is not None:
        validation.state_indices(state_indices, "state_indices", (N,), q, "q")
    elif state.shape[0] < N:
        raise ValueError(f"state: expected at least {N} slots without state_indices, got {state.shape[0]}")
    if token_state_indices is not None:
        validation.state_indices(token_state_indices, "token_state_indices", tuple(q.shape[:2]), q, "q")
    state = state.mT if state_v_first else state
    scale = _scale(scale, q)
    return torch.ops.gdn.recurrent_gated_delta_rule_(
        q, k, v, g, beta, state, state_indices, token_state_indices, cu_seqlens, scale
    )


def chunk_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay a head, over whole sequences, chunk by chunk; differentiable.

    ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t``: the gated delta rule without the delta. It is
    Mamba2's rule (arXiv 2405.21060, section 6) with C as q, B as k (one head a group), dt * x as v, dt * A as g and
    ``scale=1``.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]`` with ``HV % H == 0``; one dtype (fp32, bf16, fp16, fp64).
        g: log decay ``[B, T, HV]``, at most 0, any float dtype; -inf forgets all before it; ``None`` means 0.
        scale: factor on q, default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]`` (``[N, HV, V, K]`` with ``state_v_first``), default zeros.
        output_final_state: also return the state after the last token, in fp32 (fp64 for fp64 inputs).
        cu_seqlens: ``[N + 1]`` int32 or int64 bounds of sequences packed along T; then B is 1.

    Returns:
        ``(o [B, T, HV, V], final_state or None)``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example::

        >>> (B, C), x, dt, A = torch.randn(2, 1, 100, 1, 64), torch.randn(1, 100, 4, 32), 0.1, -1.0
        >>> g = torch.full((1, 100, 4), dt * A)
        >>> o, state = chunk_gated_linear_attention(C, B, dt * x, g, scale=1.0, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 32]), torch.Size([1, 4, 64, 32]))
    """
    validation.gated_linear_attention(q, k, v, g, cu_seqlens)
    gates, op = (_no_decay(v) if g is None else g,), torch.ops.gdn.chunk_gated_linear_attention
    return _run(op, q, k, v, gates, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def recurrent_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same rule token by token, for decode and short sequences; differentiable.

    Arguments, shapes, results and errors as :func:`chunk_gated_linear_attention` (which see for what it raises).

    Example::

        >>> q, k = torch.randn(2, 1, 1, 1, 64)
        >>> v, g, state = torch.randn(1, 1, 4, 32), -torch.rand(1, 1, 4), torch.zeros(1, 4, 64, 32)
        >>> o, state = recurrent_gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 1, 4, 32]), torch.Size([1, 4, 64, 32]))
    """
    validation.gated_linear_attention(q, k, v, g, cu_seqlens)
    gates, op = (_no_decay(v) if g is None else g,), torch.ops.gdn.recurrent_gated_linear_attention
    return _run(op, q, k, v, gates, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution ``x [B, T, D]``, ``weight [D, W]`` (W 2 to 4), ``bias [D]``; differentiable.

    ``activation`` is ``None``, ``"silu"`` or ``"swish"``. ``initial_state`` and the returned state are
    ``[N, D, W - 1]`` in x's dtype, oldest input first. ``cu_seqlens`` packs sequences along T (then B is 1).
    Raises ``ValueError`` or ``TypeError`` naming the argument.

    Example::

        >>> y, state = causal_conv1d(torch.randn(1, 9, 8), torch.randn(8, 4), output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 9, 8]), torch.Size([1, 8, 3]))
    """
    validation.causal_conv1d(x, weight, bias, activation, cu_seqlens)
    if initial_state is not None:
        N = sequence_count(x, cu_seqlens)
        validation.state(initial_state, "initial_state", (N, *weight.shape[:1], weight.shape[1] - 1), x, "x")
        initial_state = initial_state.to(x.dtype)
    op = torch.ops.gdn.causal_conv1d
    y, state = op(x, weight, bias, initial_state, cu_seqlens, activation is not None, bool(output_final_state))
    return y, state if output_final_state else None


def causal_conv1d_update_(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Decode form: ``x [B, D]`` or ``[B, T, D]``; ``state [P, D, W - 1]`` is read and advanced in place.

    Index rules and errors as in :func:`recurrent_gated_delta_rule_`; other arguments and what it raises as in
    :func:`causal_conv1d`. Not differentiable.

    Example::

        >>> state = torch.zeros(1, 8, 3)
        >>> y = causal_conv1d_update_(torch.ones(1, 8), state, torch.randn(8, 4), activation="silu")
        >>> y.shape, state[0, 0]
        (torch.Size([1, 8]), tensor([0., 0., 1.]))
    """
    single = isinstance(x, Tensor) and x.dim() == 2
    x = x[:, None] if single else x
    validation.causal_conv1d(x, weight, bias, activation, None)
    validation.pool(state, "state", (weight.shape[0], weight.shape[1] - 1), x, "x")
    if state_indices is not None:
        validation.state_indices(state_indices, "state_indices", (x.shape[0],), x, "x")
    elif state.shape[0] < x.shape[0]:
        raise ValueError(f"state: expected at least {x.shape[0]} slots without state_indices, got {state.shape[0]}")
    y = torch.ops.gdn.causal_conv1d_update_(x, weight, bias, state, state_indices, activation is not None)
    return y[:, 0] if single else y
