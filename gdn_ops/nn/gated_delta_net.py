"""The Gated DeltaNet layer (arXiv 2412.06464, figure 1 and section 3.4).

From ``x [B, T, hidden_size]``::

    q, k, v = split(silu(conv(qkv_proj(x))))                    short causal convolution, depthwise
    g       = -exp(A_log) * softplus(a_proj(x) + dt_bias)       log decay, one a value head
    beta    = sigmoid(b_proj(x))                                writing strength; doubled with allow_neg_eigval
    o       = gated_delta_rule(q / |q|, k / |k|, v, g, beta)
    y       = o_proj(rmsnorm(o) * silu(z_proj(x)))              norm and gate a head

q, k and v come out of one product and go through one convolution call. State goes in and comes out explicitly and is
never written in place::

    {"recurrent": [B, HV, K, V] fp32, "conv": [B, 2 H K + HV V, conv_size - 1]}

A call whose length is 1 when it is traced or run (decode) takes the recurrent operator, every other the chunkwise one;
a symbolic length is never 1 here, so a compiled or exported prefill stays right for all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gdn_ops.functional import (
    chunk_gated_delta_rule,
    chunk_gated_linear_attention,
    recurrent_gated_delta_rule,
    recurrent_gated_linear_attention,
    rule_inputs,
)
from gdn_ops.nn.mixer import RecurrentMixer
from gdn_ops.nn.norm import GatedRMSNorm, RMSNorm
from gdn_ops.nn.padding import real_tokens
from gdn_ops.nn.projection import project


class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet as a mixer of tokens; without the decay it is DeltaNet (arXiv 2406.06484).

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads of q and k.
        num_v_heads: heads of v (and of the state), a multiple of ``num_heads``; default ``num_heads``.
        head_k_dim: features of a q and k head; default ``0.75 * hidden_size / num_heads`` (the paper's).
        head_v_dim: features of a v head; default ``expand_v * head_k_dim``.
        expand_v: see ``head_v_dim``; refused together with it.
        conv_size: width of the short convolution, 2 to 4.
        use_short_conv: without it, q, k and v pass through SiLU alone.
        use_gate: without it, the output is normalised but not gated.
        allow_neg_eigval: beta in (0, 2), so that a transition may have negative eigenvalues (arXiv 2411.12537).
        use_decay: without it, nothing is forgotten but what is written over: DeltaNet's rule.
        use_delta: without it, ``beta v`` is added to the state whole: gated linear attention. For ablations.
        use_qk_l2norm: without it, queries and keys are as long as they come. For ablations.
        norm_eps: under the root of the output norm.

    Example::

        >>> layer = GatedDeltaNet(64, num_heads=2, head_k_dim=16, head_v_dim=32)
        >>> x = torch.randn(1, 10, 64)
        >>> y, state = layer(x, output_state=True)
        >>> y_next, state = layer(x[:, :1], state=state)
        >>> y_next.shape, {name: tuple(s.shape) for name, s in state.items()}
        (torch.Size([1, 1, 64]), {'recurrent': (1, 2, 16, 32), 'conv': (1, 128, 3)})
    """

    DECAY_RANGE = (0.0, 16.0)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_v_heads: int | None = None,
        head_k_dim: int | None = None,
        head_v_dim: int | None = None,
        expand_v: float | None = None,
        conv_size: int = 4,
        use_short_conv: bool = True,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        use_decay: bool = True,
        use_delta: bool = True,
        use_qk_l2norm: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.head_k_dim, self.head_v_dim = _head_dims(hidden_size, num_heads, head_k_dim, head_v_dim, expand_v)
        self.conv_size, self.use_gate, self.allow_neg_eigval = conv_size, use_gate, allow_neg_eigval
        self.use_decay, self.use_delta, self.use_qk_l2norm = use_decay, use_delta, use_qk_l2norm
        if self.num_v_heads < 1 or self.num_v_heads % num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads={num_heads}, got {num_v_heads}")

        self.key_dim, self.value_dim = num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.recurrent_shape = (self.num_v_heads, self.head_k_dim, self.head_v_dim)
        self.qkv_proj = nn.Linear(hidden_size, self.conv_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False) if use_decay else None
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.z_proj = nn.Linear(hidden_size, self.value_dim, bias=False) if use_gate else None
        self.conv_weight = self.conv_bias = self.A_log = self.dt_bias = None
        if use_short_conv:
            self._make_convolution(conv_size)
        if use_decay:
            self._make_gate(self.num_v_heads)
        self.o_norm = (GatedRMSNorm if use_gate else RMSNorm)(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.reset_parameters()

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}x{self.head_k_dim}, v_heads={self.num_v_heads}x{self.head_v_dim}"
        return f"{heads}, conv_size={self.conv_size if self.use_short_conv else None}"

    @property
    def input_proj(self) -> nn.Module:
        return self.qkv_proj

    def _mix(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, dict[str, Tensor] | None]:
        T, state = x.shape[1], state or {}
        qkv = self.qkv_proj(x)
        a, b = project(x, self.a_proj, self.b_proj) if self.use_decay else (None, *project(x, self.b_proj))
        if lengths is not None:  # softplus(-inf) = sigmoid(-inf) = 0: no decay and no writing
            padded = ~real_tokens(lengths, T)[:, :, None]
            a, b = (None if y is None else y.masked_fill(padded, -torch.inf) for y in (a, b))
        qkv, conv = self._convolve(qkv, lengths, state.get("conv"), cu_seqlens, output_state)
        o, recurrent = self._rule(statically_known_true(T == 1))(
            *self._heads(qkv), a, b,
            initial_state=state.get("recurrent"),
            output_final_state=output_state,
            use_qk_l2norm_in_kernel=self.use_qk_l2norm,
            use_gate_in_kernel=self.use_decay, A_log=self.A_log, dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=self.allow_neg_eigval,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        gate = (self.z_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim)),) if self.use_gate else ()
        y = self.o_proj(self.o_norm(o, *gate).flatten(-2))
        return y, self._new_state(recurrent, conv, state) if output_state else None

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v. Features become heads before the cut: after it, Inductor (torch 2.11) would not fuse the two
        passes of the norms' gradients, whose second one, into qkv's gradient, would then have other axes."""
        width = math.gcd(self.head_k_dim, self.head_v_dim)
        counts = [size // width for size in (self.key_dim, self.key_dim, self.value_dim)]
        parts = qkv.unflatten(-1, (sum(counts), width)).split(counts, dim=-2)
        pieces = [size // width for size in (self.head_k_dim, self.head_k_dim, self.head_v_dim)]
        return tuple(x if n == 1 else x.unflatten(-2, (-1, n)).flatten(-2) for x, n in zip(parts, pieces))

    def _rule(self, one_token: bool) -> Callable:
        if self.use_delta:
            return recurrent_gated_delta_rule if one_token else chunk_gated_delta_rule
        return partial(_without_delta, recurrent_gated_linear_attention if one_token else chunk_gated_linear_attention)


def _without_delta(
    rule: Callable, q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, *, use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool, A_log: Tensor | None, dt_bias: Tensor | None, use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool, cu_seqlens: Tensor | None, **states,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``rule`` of gated linear attention on what the delta rule takes; it writes ``beta v``."""
    q, k, g, beta = rule_inputs(
        q, k, v, a, b, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, cu_seqlens,
    )  # fmt: skip
    return rule(q, k, (v * beta[..., None]).to(v.dtype), g, cu_seqlens=cu_seqlens, **states)


def _head_dims(hidden_size, num_heads, head_k_dim, head_v_dim, expand_v) -> tuple[int, int]:
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    head_k_dim = 0.75 * hidden_size / num_heads if head_k_dim is None else head_k_dim
    if head_v_dim is None:
        head_v_dim = head_k_dim * (2.0 if expand_v is None else expand_v)
    elif expand_v is not None:
        raise ValueError(f"expand_v: expected None together with head_v_dim, got {expand_v}")
    for name, size in (("head_k_dim", head_k_dim), ("head_v_dim", head_v_dim)):
        if size != int(size) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    return int(head_k_dim), int(head_v_dim)
