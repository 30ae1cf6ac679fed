"""The CPU convolution as such: a sum of W shifted products, in memory of its own, accumulated in fp32."""

from __future__ import annotations

import pytest
import torch

from gdn_ops import reference
from gdn_ops.kernels.cpu import causal_conv1d as cpu
from tests.oracle import assert_close, make_conv_inputs


@pytest.mark.parametrize("B, D, W", [(1, 1, 2), (1, 5, 2), (1, 1, 4), (2, 5, 4)])
def test_results_are_small_contiguous_and_share_no_memory(B, D, W):
    """A state of three columns must not keep the window of a whole prompt alive."""
    x = make_conv_inputs(B, 50, D, W, initial_state=True)
    args = (x["x"], x["weight"], x["bias"], x["initial_state"])
    results = [*cpu.forward(*args, None, True, True)]
    results += cpu.backward(torch.ones_like(x["x"]), torch.ones_like(x["initial_state"]), *args, None, True)
    storages = [t.untyped_storage() for t in results]
    assert len({s.data_ptr() for s in storages} | {t.data_ptr() for t in args}) == len(results) + len(args)
    for t, storage in zip(results, storages):
        assert t.is_contiguous() and storage.nbytes() == t.numel() * t.element_size()


def test_low_precision_is_rounded_once():
    """bf16 in, fp32 inside: the result is the nearest bf16 to the exact one, but for ties."""
    x = make_conv_inputs(2, 300, 16, 4, torch.bfloat16)
    y, _ = cpu.forward(x["x"], x["weight"], x["bias"], None, None, False, False)
    exact, _ = reference.causal_conv1d(*(x[n].double() for n in ("x", "weight", "bias")))
    assert (y == exact.bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize("silu", [False, True])
def test_weight_gradient_over_a_long_sequence(silu):
    x = make_conv_inputs(1, 8192, 8, 4)
    dy = torch.randn(1, 8192, 8)
    args = [x["x"], x["weight"], x["bias"], None, None, silu]
    got = cpu.backward(dy, None, *args)
    want = cpu.backward(dy.double(), None, *(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    for name, g, w in zip(("dx", "dweight", "dbias"), got, want):
        assert_close(g, w, 5e-5, name)
