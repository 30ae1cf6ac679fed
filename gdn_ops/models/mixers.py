"""The mixers a model's layers may have: one row of ``MIXERS`` a kind.

A mixer is a module with ``forward(hidden_states, attention_mask, state, cu_seqlens, output_state, lengths)`` and
``init_state(batch, device, dtype)``, as :class:`gdn_ops.nn.GatedDeltaNet` has them. A state named ``position`` is kept
once for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from gdn_ops.nn import GatedDeltaNet, SlidingWindowAttention

if TYPE_CHECKING:
    from gdn_ops.models.config import HybridConfig


class Mixer(NamedTuple):
    """``letter`` stands for the kind in a pattern; ``build`` makes one from a configuration that passed ``check``."""

    letter: str
    build: Callable[[HybridConfig], nn.Module]
    check: Callable[[HybridConfig], None]


def _gated_delta_net(config: HybridConfig) -> nn.Module:
    return GatedDeltaNet(
        config.hidden_size,
        num_heads=config.num_heads,
        num_v_heads=config.num_v_heads,
        head_k_dim=config.head_k_dim,
        head_v_dim=config.head_v_dim,
        conv_size=config.conv_size,
        allow_neg_eigval=config.allow_neg_eigval,
        norm_eps=config.norm_eps,
    )


def _check_gated_delta_net(config: HybridConfig) -> None:
    _expect_multiple(config, "num_v_heads", "num_heads")
    if not 2 <= config.conv_size <= 4:
        raise ValueError(f"conv_size: expected 2 to 4, got {config.conv_size}")


def _sliding_window_attention(config: HybridConfig) -> nn.Module:
    return SlidingWindowAttention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.attention_head_dim,
        window=config.window,
        rope_theta=config.rope_theta,
    )


def _check_sliding_window_attention(config: HybridConfig) -> None:
    _expect_multiple(config, "num_attention_heads", "num_key_value_heads")
    if config.attention_head_dim is None:
        _expect_multiple(config, "hidden_size", "num_attention_heads")
    head_dim = config.attention_head_dim or config.hidden_size // config.num_attention_heads
    if head_dim % 2:
        raise ValueError(f"attention_head_dim: expected an even number, got {head_dim}")


def _expect_multiple(config: HybridConfig, name: str, of: str) -> None:
    value, unit = getattr(config, name), getattr(config, of)
    if value is not None and unit is not None and value % unit:
        raise ValueError(f"{name}: expected a multiple of {of}={unit}, got {value}")


MIXERS = {
    "gdn": Mixer("G", _gated_delta_net, _check_gated_delta_net),
    "swa": Mixer("S", _sliding_window_attention, _check_sliding_window_attention),
}
