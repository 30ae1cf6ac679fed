"""The mixers a model's layers may have: one row of ``MIXERS`` a kind.

A mixer is a :class:`gdn_ops.nn.mixer.Mixer`. A state named ``position`` is kept once for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from gdn_ops.nn import GatedDeltaNet, Mamba2, SlidingWindowAttention

if TYPE_CHECKING:
    from gdn_ops.models.config import HybridConfig


class MixerKind(NamedTuple):
    """``letter`` stands for the kind in a pattern; ``build`` makes one from a configuration that passed ``check``."""

    letter: str
    build: Callable[[HybridConfig], nn.Module]
    check: Callable[[HybridConfig], None]


def _gated_delta_net(config: HybridConfig, use_decay: bool | None = None) -> nn.Module:
    return GatedDeltaNet(
        config.hidden_size,
        num_heads=config.num_heads,
        num_v_heads=config.num_v_heads,
        head_k_dim=config.head_k_dim,
        head_v_dim=config.head_v_dim,
        conv_size=config.conv_size,
        use_short_conv=config.use_short_conv,
        use_gate=config.use_gate,
        allow_neg_eigval=config.allow_neg_eigval,
        use_decay=config.use_decay if use_decay is None else use_decay,
        use_delta=config.use_delta,
        use_qk_l2norm=config.use_qk_l2norm,
        norm_eps=config.norm_eps,
    )


def _delta_net(config: HybridConfig) -> nn.Module:
    return _gated_delta_net(config, use_decay=False)


def _check_gated_delta_net(config: HybridConfig) -> None:
    _expect_multiple(config, "num_v_heads", "num_heads")
    if config.use_short_conv:
        _check_convolution(config)


def _mamba2(config: HybridConfig) -> nn.Module:
    return Mamba2(
        config.hidden_size,
        head_dim=config.mamba_head_dim,
        state_size=config.mamba_state_size,
        n_groups=config.mamba_groups,
        expand=config.mamba_expand,
        conv_size=config.conv_size,
        norm_eps=config.norm_eps,
    )


def _check_mamba2(config: HybridConfig) -> None:
    heads = config.mamba_expand * config.hidden_size / config.mamba_head_dim
    if heads != int(heads):
        raise ValueError(
            f"mamba_head_dim: expected a divisor of mamba_expand * hidden_size="
            f"{config.mamba_expand * config.hidden_size:g}, got {config.mamba_head_dim}"
        )
    if heads % config.mamba_groups:
        raise ValueError(f"mamba_groups: expected a divisor of the {heads:g} heads, got {config.mamba_groups}")
    _check_convolution(config)


def _check_convolution(config: HybridConfig) -> None:
    if not 2 <= config.conv_size <= 4:
        raise ValueError(f"conv_size: expected 2 to 4, got {config.conv_size}")


def _attention(config: HybridConfig) -> nn.Module:
    """Full attention, to as many tokens as the model is made for."""
    return _sliding_window_attention(config, config.max_position)


def _sliding_window_attention(config: HybridConfig, window: int | None = None) -> nn.Module:
    return SlidingWindowAttention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.attention_head_dim,
        window=config.window if window is None else window,
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
    "gdn": MixerKind("G", _gated_delta_net, _check_gated_delta_net),
    "deltanet": MixerKind("D", _delta_net, _check_gated_delta_net),
    "mamba2": MixerKind("M", _mamba2, _check_mamba2),
    "swa": MixerKind("S", _sliding_window_attention, _check_sliding_window_attention),
    "attention": MixerKind("A", _attention, _check_sliding_window_attention),
}
