"""Rows brought to the left and back."""

from __future__ import annotations

import doctest

import pytest
import torch

from gdn_ops.nn import Padding, padding
from gdn_ops.nn.padding import real_tokens
from tests.nn.samples import LAYOUTS, LENGTHS, mask


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


def test_documented_example_runs():
    results = doctest.testmod(padding, extraglobs={"torch": torch})
    assert results.failed == 0 and results.attempted > 0
