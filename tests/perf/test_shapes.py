"""What a problem costs, counted by hand; what a shape's text means."""

from __future__ import annotations

import pytest
import torch

from perf.shapes import DIRECTIONS, SUITES, Shape, cost, make_inputs, parse_shape


def test_forward_counted_by_hand():
    """One chunk of one head, K = V = 64: each product of the chunk form is 64 x 64 x 64."""
    cube = 64**3
    # K K^T, Q K^T, W = T K; U = T V, (Q K^T) V'; the inverse, a third; W S, Q S, K^T V'.
    products = 3 * cube + 2 * cube + 64 * (64 * 64 // 3) + 3 * cube
    got = cost(Shape(1, 1, 1, 64, 64, 64), "forward", torch.bfloat16)
    assert got.flops == 2 * products
    assert got.bytes == 4 * 64 * 64 * 2  # q, k, v, o


def test_decode_counted_by_hand():
    """The state, fp32, is read and written; per element of it K^T S, the update and Q^T S, two operations each."""
    got = cost(Shape(2, 4, 3, 1, 8, 16), "decode", torch.float32)
    assert got.flops == 3 * 4 * 6 * 8 * 16
    assert got.bytes == 3 * (2 * 2 * 8 + 2 * 4 * 16) * 4 + 2 * 3 * 4 * 8 * 16 * 4


def test_backward_moves_inputs_gradients_and_do():
    shape = Shape(2, 4, 1, 128, 32, 64)
    tensors = {"q": 2 * 32, "k": 2 * 32, "v": 4 * 64}
    each = {n: 128 * width * 2 for n, width in tensors.items()}
    backward = cost(shape, "backward", torch.bfloat16)
    assert backward.bytes == 2 * sum(each.values()) + each["v"]
    both, forward = (cost(shape, d, torch.bfloat16) for d in ("forward+backward", "forward"))
    assert both.bytes == forward.bytes + backward.bytes
    assert both.flops == forward.flops + backward.flops


def test_the_floor_of_the_headline_shape():
    """The figure that everyone can check: bytes of 1x8192 16/32 bf16 at 4.30 TB/s take 0.047 ms."""
    assert cost(Shape(16, 32, 1, 8192), "forward", torch.bfloat16).bytes / 4.30e12 * 1e3 == pytest.approx(
        0.047, rel=0.01
    )


def test_wrong_direction():
    with pytest.raises(ValueError, match=r"direction: expected one of forward, .* got 'sideways'"):
        cost(Shape(1, 1, 1, 64), "sideways", torch.float32)


def test_parse_shape():
    assert parse_shape("16,32,1,8192,128,256") == Shape(16, 32, 1, 8192, 128, 256)
    assert str(parse_shape("2,8,4,64,128,128")) == "2/8 4x64"
    for text, message in (("1,2,3", "six positive integers"), ("1,1,1,0,1,1", "six"), ("2,3,1,64,8,8", "divisible")):
        with pytest.raises(ValueError, match=message):
            parse_shape(text)


def test_suites_start_with_the_row_to_look_at():
    for name, tasks in SUITES.items():
        assert len(set(tasks)) == len(tasks)
        assert all(direction in DIRECTIONS for _, direction in tasks)
        assert tasks[0][0][:2] == (16, 32), name


def test_inputs_are_a_layers():
    x = make_inputs(Shape(2, 4, 2, 8, 16, 32), torch.float32, "cpu", seed=1)
    assert x.q.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert x.g.shape == (2, 8, 4) and x.g.max() < 0 and x.g.min() >= -1.6
    assert not x.state.any() and make_inputs(Shape(2, 4, 2, 1, 16, 32), torch.float32, "cpu").state.any()
    again, other = (make_inputs(Shape(2, 4, 2, 8, 16, 32), torch.float32, "cpu", seed) for seed in (1, 2))
    assert torch.equal(x.v, again.v) and not torch.equal(x.v, other.v)
