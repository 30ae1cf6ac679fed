"""SwiGLU: values and gradients."""

from __future__ import annotations

import pytest
import torch

from gdn_ops.nn import SwiGLU
from tests.nn import plain
from tests.oracle import DEVICES, TOLERANCE, assert_close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(dtype, device):
    torch.manual_seed(0)
    layer = SwiGLU(16, 40).to(device, dtype)
    x = torch.randn(2, 5, 16, dtype=torch.float64).to(device, dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn(2, 5, 16, dtype=torch.float64).to(y)
    y.backward(dy)
    weights, x_wide = plain.wide(layer), x.detach().cpu().double().requires_grad_()
    gate, up = (x_wide @ weights["gate_up_proj.weight"].T).split(40, -1)
    want = (plain.silu(gate) * up) @ weights["down_proj.weight"].T
    want.backward(dy.cpu().double())
    assert_close(y, want, TOLERANCE[dtype].values, "y")
    assert_close(x.grad, x_wide.grad, TOLERANCE[dtype].grads, "dx")
    for name, p in layer.named_parameters():
        assert_close(p.grad, weights[name].grad, TOLERANCE[dtype].grads, "d" + name)
