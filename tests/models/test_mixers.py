"""The table of mixers: each kind is built with the configuration's sizes."""

from __future__ import annotations

import pytest

from gdn_ops.models.mixers import MIXERS
from gdn_ops.nn import GatedDeltaNet, Mamba2, SlidingWindowAttention
from tests.models.models import make


def test_letters_and_names_are_distinct():
    assert len({mixer.letter for mixer in MIXERS.values()} | set(MIXERS)) == 2 * len(MIXERS)


def test_sizes_reach_the_layers():
    model = make(
        num_v_heads=6, conv_size=3, allow_neg_eigval=True, attention_head_dim=10, rope_theta=77.0, norm_eps=1e-3
    )
    mixer, attention = (layer.mixer for layer in model.layers)
    assert isinstance(mixer, GatedDeltaNet) and isinstance(attention, SlidingWindowAttention)
    assert (mixer.num_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim) == (2, 6, 16, 24)
    assert mixer.conv_size == 3 and mixer.allow_neg_eigval and mixer.o_norm.eps == 1e-3
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 10)
    assert (attention.window, attention.rope_theta) == (12, 77.0)


def test_sizes_reach_mamba2_and_attention():
    model = make("MA", mamba_expand=1.5, mamba_groups=3, conv_size=2, max_position=77, norm_eps=1e-3)
    mixer, attention = (layer.mixer for layer in model.layers)
    assert isinstance(mixer, Mamba2) and isinstance(attention, SlidingWindowAttention)
    assert (mixer.num_heads, mixer.head_dim, mixer.state_size, mixer.n_groups) == (3, 16, 8, 3)
    assert mixer.conv_size == 2 and mixer.o_norm.eps == 1e-3 and attention.window == 77


@pytest.mark.parametrize("flag", ["use_short_conv", "use_gate", "use_decay", "use_delta", "use_qk_l2norm"])
def test_what_a_gated_delta_net_may_do_without(flag):
    with_it, without = (make("G", **{flag: x}).layers[0].mixer for x in (True, False))
    if flag == "use_short_conv":
        assert with_it.conv_weight is not None and without.conv_weight is None
    else:
        assert getattr(with_it, flag) and not getattr(without, flag)


def test_deltanet_is_a_gated_delta_net_without_decay():
    mixer = make("D").layers[0].mixer
    assert isinstance(mixer, GatedDeltaNet) and not mixer.use_decay and mixer.use_delta and mixer.A_log is None


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_keeps_the_contract(name):
    mixer = make([name]).layers[0].mixer
    state = mixer.init_state(3)
    assert tuple(state) == mixer.state_names and all(s.shape[0] == 3 and not s.any() for s in state.values())
