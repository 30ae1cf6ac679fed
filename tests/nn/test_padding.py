"""Rows brought to the left and back."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.nn import GatedDeltaNet, Mamba2, Padding, SlidingWindowAttention
from gdn_ops.nn.padding import check_rows, real_tokens
from tests.nn.samples import LAYOUTS, LENGTHS, mask

LAYERS = {
    "GatedDeltaNet": lambda: GatedDeltaNet(48, num_heads=2, head_k_dim=12, head_v_dim=20),
    "Mamba2": lambda: Mamba2(48, head_dim=16, state_size=8),
    "SlidingWindowAttention": lambda: SlidingWindowAttention(48, num_heads=2, window=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", [(), (3,), (2, 3)], ids=str)
def test_real_tokens_come_first_in_order_and_go_back(layout, features):
    attention_mask = mask(layout)
    x = torch.randn(*attention_mask.shape, *features)
    there = Padding.of(attention_mask)
    assert there.lengths.tolist() == list(LENGTHS)
    compact = there.compact(x)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(compact[row, :length], x[row, attention_mask[row] == 1])
    assert torch.equal(there.restore(compact), x)


def test_any_mask_dtype():
    attention_mask = mask("middle")
    for other in (attention_mask.bool(), attention_mask.float(), attention_mask.int() * 7):
        assert all(torch.equal(a, b) for a, b in zip(Padding.of(other), Padding.of(attention_mask)))


def test_rows_without_a_real_or_without_a_padding_token():
    there = Padding.of(torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert there.lengths.tolist() == [0, 3] and there.slot.tolist() == [[0, 1, 2]] * 2
    assert real_tokens(there.lengths, 3).tolist() == [[False] * 3, [True] * 3]


def test_no_tokens_at_all():
    assert Padding.of(torch.ones(2, 0)).lengths.tolist() == [0, 0]


def test_lengths_of_a_dtype_that_cannot_count_the_tokens():
    rows = torch.zeros(2, 300, 1)
    check_rows(rows, "rows", None, torch.tensor([200, 7], dtype=torch.uint8), None)
    with pytest.raises(ValueError, match=r"lengths: expected numbers of tokens in \[0, 300\], got -1"):
        check_rows(rows, "rows", None, torch.tensor([100, -1], dtype=torch.int8), None)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_no_number_at_padding_stays_there(layer):
    mixer, attention_mask = LAYERS[layer](), mask("left")
    x = torch.randn(*attention_mask.shape, 48)
    hole = x.masked_fill(attention_mask[:, :, None] == 0, torch.nan)
    (y, state), (want, want_state) = (mixer(z, attention_mask=attention_mask, output_state=True) for z in (hole, x))
    assert torch.equal(y[attention_mask == 1], want[attention_mask == 1])
    assert all(torch.equal(state[name], want_state[name]) for name in want_state)
    y = mixer(hole.flip(1), lengths=attention_mask.sum(1))[0].flip(1)
    assert not y[attention_mask == 1].isnan().any()
