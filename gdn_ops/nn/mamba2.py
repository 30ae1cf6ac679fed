"""The Mamba2 layer (arXiv 2405.21060, section 7).

From ``x [B, T, hidden_size]``::

    z, u, dt = split(in_proj(x))
    v, B, C  = split(silu(conv(u)))                             short causal convolution, depthwise, with bias
    dt       = clamp(softplus(dt + dt_bias), *dt_limit)         step, one a head
    o        = gated_linear_attention(q=C, k=B, v=dt * v, g=-exp(A_log) * dt, scale=1)
    y        = o_proj(rmsnorm((o + D * v) * silu(z)))           the norm a group of heads

B and C have ``n_groups`` heads, each of them shared by the value heads of its group. State goes in and comes out
explicitly and is never written in place::

    {"recurrent": [B, heads, state_size, head_dim] fp32, "conv": [B, heads * head_dim + 2 n_groups state_size, W - 1]}

The weights are those of the reference implementation by other names (``conv1d.weight [D, 1, W]`` is ``conv_weight
[D, W]``, ``out_proj`` is ``o_proj``), in the same order, and its recurrent state is the transpose of this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gdn_ops.functional import chunk_gated_linear_attention, recurrent_gated_linear_attention
from gdn_ops.kernels.cpu.chunks import compute_dtype
from gdn_ops.nn.mixer import RecurrentMixer
from gdn_ops.nn.norm import GatedGroupRMSNorm
from gdn_ops.nn.padding import real_tokens
from gdn_ops.nn.projection import project


class Mamba2(RecurrentMixer):
    """Mamba2 as a mixer of tokens.

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads of v (and of the state); default ``expand * hidden_size / head_dim``.
        head_dim: features of a v head.
        state_size: features of a B and C head.
        n_groups: heads of B and C, a divisor of ``num_heads``; also the groups that are normalised apart.
        expand: see ``num_heads``; refused together with it.
        conv_size: width of the short convolution, 2 to 4.
        use_conv_bias: the convolution has a bias.
        dt_limit: the least and the greatest step, as multiples of one token.
        norm_eps: under the root of the output norm.

    Example::

        >>> layer = Mamba2(64, head_dim=16, state_size=32)
        >>> x = torch.randn(1, 10, 64)
        >>> y, state = layer(x, output_state=True)
        >>> y_next, state = layer(x[:, :1], state=state)
        >>> y_next.shape, {name: tuple(s.shape) for name, s in state.items()}
        (torch.Size([1, 1, 64]), {'recurrent': (1, 8, 32, 16), 'conv': (1, 192, 3)})
    """

    DECAY_RANGE = (1.0, 16.0)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        state_size: int = 128,
        n_groups: int = 1,
        expand: float | None = None,
        conv_size: int = 4,
        use_conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size, self.conv_size = hidden_size, conv_size
        self.num_heads = _heads(hidden_size, num_heads, head_dim, expand)
        self.head_dim, self.state_size, self.n_groups = head_dim, state_size, n_groups
        if state_size < 1:
            raise ValueError(f"state_size: expected at least 1, got {state_size}")
        if n_groups < 1 or self.num_heads % n_groups:
            raise ValueError(f"n_groups: expected a divisor of num_heads={self.num_heads}, got {n_groups}")
        low, high = self.dt_limit = tuple(dt_limit)
        if not 0 <= low < high:
            raise ValueError(f"dt_limit: expected two numbers from 0, the first one less, got {dt_limit}")

        self.value_dim, self.group_dim = self.num_heads * head_dim, n_groups * state_size
        self.conv_dim = self.value_dim + 2 * self.group_dim
        self.recurrent_shape = (self.num_heads, state_size, head_dim)
        self.in_proj = nn.Linear(hidden_size, self.value_dim + self.conv_dim + self.num_heads, bias=False)
        self._make_convolution(conv_size, use_conv_bias)
        self._make_gate(self.num_heads)
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.o_norm = GatedGroupRMSNorm(self.value_dim, n_groups, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As :meth:`gdn_ops.nn.mixer.RecurrentMixer.reset_parameters`, with A in [1, 16]; and D of ones."""
        super().reset_parameters()
        self.D.fill_(1.0)

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}x{self.head_dim}, groups={self.n_groups}x{self.state_size}"
        return f"{heads}, conv_size={self.conv_size}"

    @property
    def input_proj(self) -> nn.Module:
        return self.in_proj

    def _mix(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, dict[str, Tensor] | None]:
        T, state = x.shape[1], state or {}
        z, u, dt = project(x, self.in_proj)[0].split([self.value_dim, self.conv_dim, self.num_heads], dim=-1)
        wide = compute_dtype(x)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        if lengths is not None:  # a step of 0: no decay and no writing
            dt = dt.masked_fill(~real_tokens(lengths, T)[:, :, None], 0.0)
        u, conv = self._convolve(u, lengths, state.get("conv"), cu_seqlens, output_state)
        v, k, q = u.split([self.value_dim, self.group_dim, self.group_dim], dim=-1)
        v_wide = v.unflatten(-1, (self.num_heads, self.head_dim)).to(wide)
        rule = recurrent_gated_linear_attention if statically_known_true(T == 1) else chunk_gated_linear_attention
        o, recurrent = rule(
            q.unflatten(-1, (self.n_groups, self.state_size)),
            k.unflatten(-1, (self.n_groups, self.state_size)),
            (v_wide * dt[..., None]).to(v.dtype),
            -self.A_log.to(wide).exp() * dt,
            scale=1.0,
            initial_state=state.get("recurrent"),
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )
        # Expanded, so that D's gradient sums tokens and features in two steps. Of one large sum on the CPU, Inductor
        # asks whether it is longer than 4096, and then compiles long input anew.
        o = o.to(wide) + v_wide * self.D.to(wide)[:, None].expand(-1, self.head_dim)
        y = self.o_proj(self.o_norm(o.flatten(-2), z))
        return y, self._new_state(recurrent, conv, state) if output_state else None


def _heads(hidden_size: int, num_heads: int | None, head_dim: int, expand: float | None) -> int:
    if head_dim < 1:
        raise ValueError(f"head_dim: expected at least 1, got {head_dim}")
    if num_heads is None:
        num_heads = hidden_size * (2.0 if expand is None else expand) / head_dim
    elif expand is not None:
        raise ValueError(f"expand: expected None together with num_heads, got {expand}")
    if num_heads != int(num_heads) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive integer, got {num_heads}")
    return int(num_heads)
