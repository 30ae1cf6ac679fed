"""The short convolution against the specification: values, gradients, states, packing, and the in-place decode form."""

from __future__ import annotations

import itertools

import pytest
import torch

import gdn_ops
from gdn_ops import reference
from tests.oracle import DEVICES, TOLERANCE, assert_close, make_conv_inputs

DTYPES = list(TOLERANCE)
LEAVES = ("x", "weight", "bias", "initial_state")
pytestmark = pytest.mark.parametrize("device", DEVICES)


def run(function, inputs, activation, cotangents=None, **more):
    """Results and gradients by name; the cotangents are drawn once and shared."""
    x = {n: t.detach().requires_grad_() if t is not None and n in LEAVES else t for n, t in inputs.items()}
    y, state = function(**x, activation=activation, **more)
    generator = torch.Generator().manual_seed(3)
    if cotangents is None:
        draw = (torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in (y, state))
        cotangents = tuple(c.to(r.device, inputs["x"].dtype) for c, r in zip(draw, (y, state)))
    names = [n for n in LEAVES if x[n] is not None]
    matching = [c.to(r.device, r.dtype) for c, r in zip(cotangents, (y, state))]
    grads = torch.autograd.grad([y, state], [x[n] for n in names], matching, allow_unused=True)
    grads = [torch.zeros_like(x[n]) if grad is None else grad for n, grad in zip(names, grads)]
    return {"y": y, "state": state, **{"d" + n: grad for n, grad in zip(names, grads)}}, cotangents


def check(inputs, activation):
    dtype = inputs["x"].dtype
    got, cotangents = run(gdn_ops.causal_conv1d, inputs, activation, output_final_state=True)
    exact = {n: t if t is None else t.cpu() if n == "cu_seqlens" else t.cpu().double() for n, t in inputs.items()}
    want, _ = run(reference.causal_conv1d, exact, activation, cotangents)
    assert got.keys() == want.keys()
    for name in got:
        bound = TOLERANCE[dtype].grads if name.startswith("d") else TOLERANCE[dtype].values
        assert_close(got[name], want[name], bound, name)
    for name in LEAVES:
        assert inputs[name] is None or got["d" + name].dtype == inputs[name].dtype


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_lengths_and_dtypes(device, activation, dtype, T):
    check(make_conv_inputs(2, T, 33, 4, dtype, device, initial_state=True), activation)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("initial_state", [False, True])
def test_widths_bias_and_state(device, initial_state, bias, W):
    check(make_conv_inputs(2, 70, 20, W, torch.float32, device, bias=bias, initial_state=initial_state), "swish")


@pytest.mark.parametrize("D", [1, 7, 300])
def test_channels(device, D):
    check(make_conv_inputs(1, 70, D, 4, torch.bfloat16, device, initial_state=True), "silu")


@pytest.mark.parametrize("bounds", [[0, 2, 2, 9, 10, 73, 140], [0, 0, 64, 128], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(device, dtype, bounds):
    check(make_conv_inputs(1, bounds[-1], 20, 4, dtype, device, initial_state=True, cu_seqlens=bounds), "silu")


def test_packed_sequences_int64_without_state(device):
    check(make_conv_inputs(1, 30, 5, 3, device=device, bias=False, cu_seqlens=torch.tensor([0, 1, 30])), None)


@pytest.mark.parametrize("layout", ["slice_of_projection", "channels_first", "last_strided"])
def test_strides_as_they_come(device, layout):
    x = make_conv_inputs(2, 70, 20, 4, torch.float32, device, initial_state=True)
    change = {
        "slice_of_projection": lambda t: torch.cat([t, t, t], dim=-1)[..., 20:40],
        "channels_first": lambda t: t.mT.contiguous().mT,
        "last_strided": lambda t: torch.stack([t, t * 0], dim=-1).flatten(-2)[..., ::2],
    }[layout]
    x["x"], x["weight"] = change(x["x"]), x["weight"].mT.contiguous().mT
    x["initial_state"] = x["initial_state"].mT.contiguous().mT
    assert not any(x[n].is_contiguous() for n in ("x", "weight", "initial_state"))
    check(x, "silu")


def test_weights_in_fp32_with_inputs_in_bf16(device):
    x = make_conv_inputs(2, 70, 20, 4, torch.bfloat16, device)
    x["weight"], x["bias"] = x["weight"].float() + 1e-4, x["bias"].float() + 1e-4
    check(x, "silu")


def test_gradcheck(device):
    x = make_conv_inputs(2, 4, 3, 4, torch.float64, device, initial_state=True)
    x.pop("cu_seqlens")
    tensors = [t.requires_grad_() for t in x.values()]

    def function(*tensors):
        return gdn_ops.causal_conv1d(**dict(zip(x, tensors)), activation="silu", output_final_state=True)

    assert torch.autograd.gradcheck(function, tensors)


def test_state_is_not_returned_unless_asked_for(device):
    x = make_conv_inputs(1, 5, 3, 4, device=device)
    assert gdn_ops.causal_conv1d(**x)[1] is None


@pytest.mark.parametrize("at", [1, 2, 40])
def test_split_is_whole(device, at):
    x = make_conv_inputs(2, 70, 20, 4, device=device, initial_state=True)
    want, want_state = gdn_ops.causal_conv1d(**x, output_final_state=True, activation="silu")
    options = {"weight": x["weight"], "bias": x["bias"], "output_final_state": True, "activation": "silu"}
    first, state = gdn_ops.causal_conv1d(x["x"][:, :at], initial_state=x["initial_state"], **options)
    second, state = gdn_ops.causal_conv1d(x["x"][:, at:], initial_state=state, **options)
    assert_close(torch.cat([first, second], dim=1), want, 1e-6, "y")
    assert torch.equal(state, want_state)


def test_packed_is_separate_and_nothing_leaks(device):
    bounds = [0, 2, 30, 30, 70]
    x = make_conv_inputs(1, 70, 20, 4, device=device, initial_state=True, cu_seqlens=bounds)
    y, state = gdn_ops.causal_conv1d(**x, output_final_state=True)
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        y_n, state_n = gdn_ops.causal_conv1d(
            x["x"][:, a:b], x["weight"], x["bias"], x["initial_state"][n : n + 1], output_final_state=True
        )
        assert_close(y[:, a:b], y_n, 1e-6, f"y of sequence {n}")
        assert torch.equal(state[n : n + 1], state_n)
    x["x"][:, 2:30] = float("nan")
    poisoned, _ = gdn_ops.causal_conv1d(**x)
    assert torch.equal(poisoned[:, :2], y[:, :2]) and torch.equal(poisoned[:, 30:], y[:, 30:])


def test_same_bits_twice(device):
    x = make_conv_inputs(2, 300, 40, 4, torch.bfloat16, device, initial_state=True)
    once, twice = (run(gdn_ops.causal_conv1d, x, "silu", output_final_state=True)[0] for _ in range(2))
    assert all(torch.equal(once[n], twice[n]) for n in once)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_is_the_convolution(device, dtype, T):
    x = make_conv_inputs(3, T, 20, 4, dtype, device, initial_state=True)
    pool = torch.randn(6, 20, 3, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    indices = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    before = pool.clone()
    y = gdn_ops.causal_conv1d_update_(x["x"], pool, x["weight"], x["bias"], "silu", indices)
    exact = [t.double().cpu() for t in (x["x"], x["weight"], x["bias"], before[[4, 0, 0]])]
    want, want_state = reference.causal_conv1d(*exact, activation="silu")
    assert y.dtype == dtype and not y[1].any()
    assert_close(y[[0, 2]], want[[0, 2]], TOLERANCE[dtype].values, "y")
    assert torch.equal(pool[[4, 0]].double().cpu(), want_state[[0, 2]])
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


@pytest.mark.parametrize("W", [2, 3, 4])
def test_update_token_by_token(device, W):
    x = make_conv_inputs(2, 6, 20, W, device=device, bias=False, initial_state=True)
    want, want_state = gdn_ops.causal_conv1d(**x, output_final_state=True)
    state = x["initial_state"].clone()
    steps = [gdn_ops.causal_conv1d_update_(x["x"][:, t], state, x["weight"]) for t in range(6)]
    assert steps[0].shape == (2, 20)
    assert_close(torch.stack(steps, dim=1), want, 1e-6, "y")
    assert torch.equal(state, want_state)


def test_update_of_a_pool_inside_a_larger_cache(device):
    x = make_conv_inputs(2, 1, 20, 4, device=device, initial_state=True)
    cache = torch.randn(4, 2, 3, 20, device=device)
    before, pool = cache.clone(), cache[:, 1].mT
    y = gdn_ops.causal_conv1d_update_(x["x"][:, 0], pool, x["weight"], None, None, torch.tensor([3, 1], device=device))
    window = torch.cat([before[[3, 1], 1].mT, x["x"].mT], dim=-1)
    assert_close(y, (window * x["weight"]).sum(-1), 1e-6, "y")
    assert torch.equal(cache[[3, 1], 1].mT, window[..., 1:])
    assert torch.equal(cache[:, 0], before[:, 0]) and torch.equal(cache[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("bad", [-2, 2, 500])
def test_update_out_of_range(device, bad):
    x = make_conv_inputs(2, 1, 20, 4, device=device)
    pool = torch.randn(2, 20, 3, device=device)
    before, indices = pool.clone(), torch.tensor([1, bad], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"state_indices must lie in \[-1, 2\)"):
            gdn_ops.causal_conv1d_update_(x["x"], pool, x["weight"], state_indices=indices)
        assert torch.equal(pool, before)
    else:
        y = gdn_ops.causal_conv1d_update_(x["x"], pool, x["weight"], state_indices=indices)
        assert not y[1].any() and y[0].any() and torch.equal(pool[0], before[0])


def test_update_is_not_differentiable(device):
    x = make_conv_inputs(1, 1, 4, 4, device=device)
    state = torch.zeros(1, 4, 3, device=device)
    y = gdn_ops.causal_conv1d_update_(x["x"], state, x["weight"].requires_grad_())
    assert not state.requires_grad
    with pytest.raises(NotImplementedError, match="causal_conv1d_update_ has no gradient"):
        y.sum().backward()
