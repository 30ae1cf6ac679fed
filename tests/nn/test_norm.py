"""RMSNorm, plain and gated: values and gradients, and dtypes under autocast."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.nn import GatedRMSNorm, RMSNorm
from tests.nn import plain
from tests.oracle import DEVICES, TOLERANCE, assert_close

on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(gated, dtype, device):
    """A large eps and small rows, so that eps counts and fp16 squares would underflow."""
    torch.manual_seed(0)
    layer = (GatedRMSNorm if gated else RMSNorm)(48, eps=1e-2).to(device, dtype)
    torch.nn.init.normal_(layer.weight)
    inputs = [torch.randn(2, 5, 3, 48, dtype=torch.float64).mul_(s).to(device, dtype) for s in (1e-1, 2.0)]
    inputs = [x.requires_grad_() for x in inputs[: 1 + gated]]
    y = layer(*inputs)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y)
    y.backward(dy)

    x, *z = (t.detach().cpu().double().requires_grad_() for t in inputs)
    weight = plain.wide(layer)["weight"]
    want = plain.rms_norm(x, weight, 1e-2)
    want = want * plain.silu(z[0]) if gated else want
    want.backward(dy.cpu().double())
    assert y.dtype == dtype
    assert_close(y, want, TOLERANCE[dtype].values, "y")
    for got, expected in zip((*inputs, layer.weight), (x, *z, weight)):
        assert_close(got.grad, expected.grad, TOLERANCE[dtype].grads, "gradient")


def test_the_result_has_the_inputs_dtype_whatever_the_weights():
    assert RMSNorm(8)(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert GatedRMSNorm(8)(torch.randn(2, 8).bfloat16(), torch.randn(2, 8)).dtype == torch.bfloat16
    assert torch.equal(RMSNorm(8).weight, torch.ones(8))


def test_zero_rows_stay_zero():
    assert torch.equal(RMSNorm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))
