"""The table of mixers: each kind is built with the configuration's sizes."""

from __future__ import annotations

import pytest

from gdn_ops.models.mixers import MIXERS
from gdn_ops.nn import GatedDeltaNet, SlidingWindowAttention
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


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_keeps_the_contract(name):
    mixer = make([name]).layers[0].mixer
    state = mixer.init_state(3)
    assert tuple(state) == mixer.state_names and all(s.shape[0] == 3 and not s.any() for s in state.values())
