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

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gdn_ops.functional import causal_conv1d, chunk_gated_delta_rule, recurrent_gated_delta_rule
from gdn_ops.nn.norm import GatedRMSNorm, RMSNorm
from gdn_ops.nn.padding import Padding, check_hidden_states, check_rows, real_tokens
from gdn_ops.validation import state as check_state

DECAY_RANGE = (0.0, 16.0)
STEP_RANGE = (1e-3, 1e-1)


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet as a mixer of tokens.

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
        norm_eps: under the root of the output norm.

    Example::

        >>> layer = GatedDeltaNet(64, num_heads=2, head_k_dim=16, head_v_dim=32)
        >>> x = torch.randn(1, 10, 64)
        >>> y, state = layer(x, output_state=True)
        >>> y_next, state = layer(x[:, :1], state=state)
        >>> y_next.shape, {name: tuple(s.shape) for name, s in state.items()}
        (torch.Size([1, 1, 64]), {'recurrent': (1, 2, 16, 32), 'conv': (1, 128, 3)})
    """

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
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.head_k_dim, self.head_v_dim = _head_dims(hidden_size, num_heads, head_k_dim, head_v_dim, expand_v)
        self.conv_size, self.use_short_conv = conv_size, use_short_conv
        self.use_gate, self.allow_neg_eigval = use_gate, allow_neg_eigval
        if self.num_v_heads < 1 or self.num_v_heads % num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads={num_heads}, got {num_v_heads}")
        if use_short_conv and not 2 <= conv_size <= 4:
            raise ValueError(f"conv_size: expected 2 to 4, got {conv_size}")

        self.key_dim, self.value_dim = num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.qkv_proj = nn.Linear(hidden_size, self.conv_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.z_proj = nn.Linear(hidden_size, self.value_dim, bias=False) if use_gate else None
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, conv_size)) if use_short_conv else None
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True
        self.o_norm = (GatedRMSNorm if use_gate else RMSNorm)(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """The paper's initial gate: decay rate A ~ U(0, 16), step log-uniform in [1e-3, 1e-1]; and the convolution as
        ``nn.Conv1d`` has it."""
        if self.conv_weight is not None:
            self.conv_weight.uniform_(-(self.conv_size**-0.5), self.conv_size**-0.5)
        # A rate of exactly 0 would have the logarithm -inf.
        self.A_log.uniform_(*DECAY_RANGE).clamp_(min=1e-4).log_()
        step = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEP_RANGE)).exp_()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}x{self.head_k_dim}, v_heads={self.num_v_heads}x{self.head_v_dim}"
        return f"{heads}, conv_size={self.conv_size if self.use_short_conv else None}"

    @property
    def state_names(self) -> tuple[str, ...]:
        """The keys of a state."""
        return tuple(self._state_shapes(1))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The state before the first token: zeros. ``dtype`` (default the weights') is the convolution's."""
        weight = self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shapes = self._state_shapes(batch)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dtypes = {"recurrent": wide, "conv": dtype}
        return {name: torch.zeros(shape, device=device, dtype=dtypes[name]) for name, shape in shapes.items()}

    def _state_shapes(self, batch) -> dict[str, tuple]:
        shapes = {"recurrent": (batch, self.num_v_heads, self.head_k_dim, self.head_v_dim)}
        if self.use_short_conv:
            shapes["conv"] = (batch, self.conv_dim, self.conv_size - 1)
        return shapes

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        state: dict[str, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = False,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Mixes ``hidden_states [B, T, hidden_size]`` along T.

        Args:
            attention_mask: ``[B, T]``, 1 for real tokens, 0 for padding, on any side. Padding changes no state and no
                other output; the outputs at padding are meaningless.
            state: as :meth:`init_state` gives it, or an earlier call; default the same, zeros.
            cu_seqlens: ``[N + 1]`` bounds of sequences packed along T; then B is 1 and states have N rows.
            output_state: return the state after each row's last real token, also implied by ``state``.
            lengths: ``[B]`` int64, instead of a mask for rows padded on the right: their numbers of real tokens.

        Returns:
            ``(y [B, T, hidden_size], new state or None)``.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        check_hidden_states(hidden_states, self.qkv_proj.weight)
        check_rows(hidden_states, "hidden_states", attention_mask, lengths, cu_seqlens)
        self._check_state(state, hidden_states, cu_seqlens)
        output_state = output_state or state is not None
        if attention_mask is None:
            return self._mix(hidden_states, lengths, state or {}, cu_seqlens, output_state)
        padding = Padding.of(attention_mask)
        y, state = self._mix(padding.compact(hidden_states), padding.lengths, state or {}, None, output_state)
        return padding.restore(y), state

    def _check_state(self, state, hidden_states, cu_seqlens) -> None:
        if state is None:
            return
        N = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shapes = self._state_shapes(N)
        if not isinstance(state, dict) or state.keys() != shapes.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected a dict of {', '.join(shapes)}, got {got}")
        for name, shape in shapes.items():
            check_state(state[name], f"state[{name!r}]", shape, hidden_states, "hidden_states")

    def _mix(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, dict[str, Tensor] | None]:
        T, new_state = x.shape[1], {}
        qkv, a, b = self.qkv_proj(x), self.a_proj(x), self.b_proj(x)
        if lengths is not None:  # softplus(-inf) = sigmoid(-inf) = 0: no decay and no writing
            padded = ~real_tokens(lengths, T)[:, :, None]
            a, b = a.masked_fill(padded, -torch.inf), b.masked_fill(padded, -torch.inf)
        qkv, conv = self._convolve(qkv, lengths, state.get("conv"), cu_seqlens, output_state)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        rule = recurrent_gated_delta_rule if statically_known_true(T == 1) else chunk_gated_delta_rule
        o, recurrent = rule(
            q.unflatten(-1, (self.num_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
            a, b,
            initial_state=state.get("recurrent"),
            output_final_state=output_state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, A_log=self.A_log, dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=self.allow_neg_eigval,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        gate = (self.z_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim)),) if self.use_gate else ()
        y = self.o_proj(self.o_norm(o, *gate).flatten(-2))
        if not output_state:
            return y, None
        new_state["recurrent"] = recurrent
        if self.use_short_conv:
            new_state["conv"] = conv.to(state["conv"].dtype) if "conv" in state else conv
        return y, new_state

    def _convolve(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, Tensor | None]:
        if not self.use_short_conv:
            return nn.functional.silu(x), None
        y, new_state = causal_conv1d(
            x, self.conv_weight, None, state, output_state and lengths is None, "silu", cu_seqlens
        )
        if output_state and lengths is not None:
            new_state = self._window_at_end(x, lengths, state)
        return y, new_state

    def _window_at_end(self, x: Tensor, lengths: Tensor, state: Tensor | None) -> Tensor:
        """The last ``conv_size - 1`` inputs before each row's own end, ``[B, D, conv_size - 1]``."""
        W = self.conv_size - 1
        before = x.new_zeros(x.shape[0], W, self.conv_dim) if state is None else state.to(x.dtype).mT
        index = lengths[:, None] + torch.arange(W, device=x.device)
        return torch.cat([before, x], 1).gather(1, index[:, :, None].expand(-1, -1, self.conv_dim)).mT.contiguous()


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
