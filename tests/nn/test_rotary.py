"""Rotary positions against complex multiplication, and that only distances count."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from gdn_ops.nn import rotate
from tests.nn import plain
from tests.oracle import DEVICES, TOLERANCE, assert_close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_values(theta, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64).to(dtype)
    position = torch.tensor([0, 1, 2, 50, 51, 1000, 2047])
    got = rotate(x.to(device), position[None].to(device), theta)
    assert got.dtype == dtype
    # fp32 holds an angle near 2047 to 2e-4 of a radian at worst.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, TOLERANCE[dtype].values)
    assert_close(got, plain.rotated(x.double(), position, theta), tolerance, "x")


def test_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum().item()

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-10)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_each_row_has_its_own_positions():
    x = torch.randn(2, 3, 1, 4)
    position = torch.tensor([[0, 1, 2], [7, 8, 9]])
    assert torch.equal(rotate(x, position)[1:], rotate(x[1:], position[1:]))


@pytest.mark.gpu
def test_angles_are_computed_once_in_compiled_code():
    """Not again for each head, each call and the backward pass: sines would take longer than memory does. (Inductor's
    code for the CPU would not, either way.)"""
    x = torch.randn(2, 2, 7, 3, 8, device="cuda", requires_grad=True)

    def call(x):
        position = torch.arange(7, device=x.device)[None]
        return rotate(x[0], position) + rotate(x[1], position).tanh()

    def run(function):
        y = function(x)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    got, codes = run_and_get_code(run, torch.compile(call, fullgraph=True))
    code = "".join(codes)
    assert len(codes) == 2 and code.count("cos(") == code.count("sin(") == 1
    for a, b in zip(got, run(call)):
        assert_close(a, b, 1e-6, "x")
