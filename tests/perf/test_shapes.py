"""What a problem costs, counted by hand; what a shape's text means."""

from __future__ import annotations

import pytest
import torch

from perf import shapes
from perf.shapes import DIRECTIONS, SUITES, Shape, cost, make_inputs, parse_shape


def test_forward_counted_by_hand():
    """One chunk of one head, K = V = 64: each product of the chunk form is 64 x 64 x 64."""
    cube = 64**3
    # K K^T, Q K^T, W = T K; U = T V, (Q K^T) V'; the inverse, a third; W S, Q S, K^T V'.
    products = 3 * cube + 2 * cube + 64 * (64 * 64 // 3) + 3 * cube
    got = cost(Shape(1, 1, 1, 64, 64, 64), "forward", torch.bfloat16)
    assert got.flops == 2 * products
    assert got.bytes == 4 * 64 * 64 * 2  # q, k, v, o


@pytest.mark.parametrize("direction, bytes_of_a_number", [("decode", 4), ("decode, bf16 state", 2)])
def test_decode_counted_by_hand(direction, bytes_of_a_number):
    """The state is read and written; per element of it K^T S, the update and Q^T S, two operations each."""
    got = cost(Shape(2, 4, 3, 1, 8, 16), direction, torch.float32)
    assert got.flops == 3 * 4 * 6 * 8 * 16
    assert got.bytes == 3 * (2 * 2 * 8 + 2 * 4 * 16) * 4 + 2 * 3 * 4 * 8 * 16 * bytes_of_a_number


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


def test_long_is_one_sequence_from_a_thousand_tokens_to_a_million():
    assert [shape.T for shape, _ in SUITES["long"]] == [1024, 4096, 16384, 65536, 262144, 1048576]
    assert {(shape._replace(T=1), d) for shape, d in SUITES["long"]} == {(Shape(16, 32, 1, 1), "forward")}
    others = [task for suite, tasks in SUITES.items() if suite != "long" for task in tasks]
    assert not set(SUITES["long"]) & set(others)  # or pictures could not tell them apart


def test_inputs_in_parts_are_those_made_at_once(monkeypatch):
    """And what the other suites measure is made at once, whatever the device's generator does with parts."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = make_inputs(Shape(2, 4, 2, 9, 16, 32), dtype, "cpu")
        monkeypatch.setattr(shapes, "PART", 4 * 4 * 32)
        parts = make_inputs(Shape(2, 4, 2, 9, 16, 32), dtype, "cpu")
        assert all(torch.equal(x, y) for x, y in zip(whole[:-1], parts[:-1]))
        assert whole.q.dtype == whole.k.dtype == whole.v.dtype == whole.do.dtype == dtype
        monkeypatch.undo()
    measured = [shape for suite in ("forward", "backward", "decode") for shape, _ in SUITES[suite]]
    assert all(s.N * s.T * max(s.H * s.K, s.HV * s.V) <= shapes.PART for s in measured)


def test_inputs_are_a_layers():
    x = make_inputs(Shape(2, 4, 2, 8, 16, 32), torch.float32, "cpu", seed=1)
    assert x.q.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert x.g.shape == (2, 8, 4) and x.g.max() < 0 and x.g.min() >= -1.6
    assert not x.state.any() and make_inputs(Shape(2, 4, 2, 1, 16, 32), torch.float32, "cpu").state.any()
    again, other = (make_inputs(Shape(2, 4, 2, 8, 16, 32), torch.float32, "cpu", seed) for seed in (1, 2))
    assert torch.equal(x.v, again.v) and not torch.equal(x.v, other.v)
