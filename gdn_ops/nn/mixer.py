"""What mixers of tokens have in common: how they are called, and how their states go in and out.

Every mixer has the same ``forward``. It checks what it was given, brings padded rows to the form in which the real
tokens stand on the left (``padding.py``), lets the mixer's own ``_mix`` work on them, and moves the results back.

:class:`RecurrentMixer` is for those whose state decays: a short convolution before the rule, and a gate whose rate and
step start where the papers start them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gdn_ops.functional import causal_conv1d
from gdn_ops.nn.padding import Padding, check_hidden_states, check_rows, real_tokens
from gdn_ops.nn.projection import weight_of, weight_or_any
from gdn_ops.ops.gated_delta_rule import sequence_count
from gdn_ops.validation import state as check_state

STEP_RANGE = (1e-3, 1e-1)


class Mixer(nn.Module):
    """Base of the mixers. One has ``hidden_size`` and ``o_proj``, and says which projection its input meets
    (:attr:`input_proj`), what its states are (``_state_shapes`` and ``_state_dtypes``, by name) and how it mixes
    (``_mix``)."""

    hidden_size: int
    o_proj: nn.Module

    @property
    def input_proj(self) -> nn.Module:
        """The projection that ``hidden_states`` meet."""
        raise NotImplementedError

    def _state_shapes(self, batch) -> dict[str, tuple]:
        raise NotImplementedError

    def _state_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of the states, for a model in ``dtype``; those that are left out have that dtype."""
        return {}

    def _mix(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, dict[str, Tensor] | None]:
        """``x [B, T, hidden_size]`` whose rows are padded on the right, if ``lengths`` are given; ``state`` or None."""
        raise NotImplementedError

    @property
    def state_names(self) -> tuple[str, ...]:
        """The keys of a state."""
        return tuple(self._state_shapes(1))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The state before the first token: zeros. ``dtype`` (default the weights') is that of what a state keeps of
        the tokens; what a rule sums up is fp32 (fp64 for fp64)."""
        weight = weight_or_any(self.o_proj, self)
        device, dtype = device or weight.device, dtype or weight.dtype
        dtypes = self._state_dtypes(dtype)
        return {
            name: torch.zeros(shape, device=device, dtype=dtypes.get(name, dtype))
            for name, shape in self._state_shapes(batch).items()
        }

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
        check_hidden_states(hidden_states, self.hidden_size, weight_of(self.input_proj))
        check_rows(hidden_states, "hidden_states", attention_mask, lengths, cu_seqlens)
        output_state = output_state or state is not None
        self._check_call(state, hidden_states, cu_seqlens, output_state)
        padding = None
        if attention_mask is not None:
            padding = Padding.of(attention_mask)
            hidden_states, lengths = padding.compact(hidden_states), padding.lengths
        if lengths is not None:  # what is no number at padding would be none in a sum either, times 0 or not
            real = real_tokens(lengths, hidden_states.shape[1])
            hidden_states = hidden_states.masked_fill(~real[:, :, None], 0)
        y, state = self._mix(hidden_states, lengths, state, cu_seqlens, output_state)
        return y if padding is None else padding.restore(y), state

    def _check_call(self, state, hidden_states, cu_seqlens, output_state) -> None:
        """ValueError or TypeError unless ``state``, if given, is one of this mixer's, of the rows' number."""
        if state is None:
            return
        N = sequence_count(hidden_states, cu_seqlens)
        shapes = self._state_shapes(N)
        if not isinstance(state, dict) or state.keys() != shapes.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected a dict of {', '.join(shapes)}, got {got}")
        for name, shape in shapes.items():
            if name == "position":
                check_position(state[name], N, hidden_states.device)
            else:
                check_state(state[name], f"state[{name!r}]", shape, hidden_states, "hidden_states")


def check_position(position: Tensor, rows, device: torch.device) -> None:
    """ValueError or TypeError unless ``position [rows]`` may count the tokens that each row has seen."""
    name = "state['position']"
    if not isinstance(position, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(position).__name__}")
    if position.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {position.dtype}")
    if position.dim() != 1 or position.shape[0] != rows:
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(position.shape)}")
    if position.device != device:
        raise ValueError(f"{name}: expected device {device}, got {position.device}")


class RecurrentMixer(Mixer):
    """A mixer of ``conv_dim`` convolved channels and a decaying state of shape ``recurrent_shape`` a row.

    It has ``conv_weight [conv_dim, conv_size]`` or None, ``conv_bias`` or None, and ``A_log`` and ``dt_bias``, one a
    head, or None.
    """

    use_short_conv = False
    DECAY_RANGE: tuple[float, float]
    conv_dim: int
    conv_size: int
    recurrent_shape: tuple[int, int, int]
    conv_weight: nn.Parameter | None
    conv_bias: nn.Parameter | None
    A_log: nn.Parameter | None
    dt_bias: nn.Parameter | None

    def _make_convolution(self, width: int, bias: bool = False) -> None:
        """``width`` 2 to 4."""
        if not 2 <= width <= 4:
            raise ValueError(f"conv_size: expected 2 to 4, got {width}")
        self.use_short_conv = True
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, width))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim)) if bias else None

    def _make_gate(self, heads: int) -> None:
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial gate of Mamba2 and Gated DeltaNet: decay rate A uniform in ``DECAY_RANGE``, step log-uniform in
        [1e-3, 1e-1]; and the convolution as ``nn.Conv1d`` has it."""
        for x in (self.conv_weight, self.conv_bias):
            if x is not None:
                x.uniform_(-(self.conv_size**-0.5), self.conv_size**-0.5)
        if self.A_log is None:
            return
        # A rate of exactly 0 would have the logarithm -inf.
        self.A_log.uniform_(*self.DECAY_RANGE).clamp_(min=1e-4).log_()
        step = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEP_RANGE)).exp_()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def _state_shapes(self, batch) -> dict[str, tuple]:
        shapes = {"recurrent": (batch, *self.recurrent_shape)}
        if self.use_short_conv:
            shapes["conv"] = (batch, self.conv_dim, self.conv_size - 1)
        return shapes

    def _state_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"recurrent": torch.float64 if dtype == torch.float64 else torch.float32}

    def _new_state(self, recurrent: Tensor, conv: Tensor | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.use_short_conv:
            return {"recurrent": recurrent}
        return {"recurrent": recurrent, "conv": conv.to(state["conv"].dtype) if "conv" in state else conv}

    def _convolve(self, x, lengths, state, cu_seqlens, output_state) -> tuple[Tensor, Tensor | None]:
        """The convolution and SiLU of ``x [B, T, conv_dim]``; without a convolution, SiLU alone."""
        if not self.use_short_conv:
            return nn.functional.silu(x), None
        y, new_state = causal_conv1d(
            x, self.conv_weight, self.conv_bias, state, output_state and lengths is None, "silu", cu_seqlens
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
