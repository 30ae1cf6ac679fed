"""The convolution kernels, forward, backward and in place: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

import pytest
import torch

from gdn_ops import reference
from tests.kernels.interpreter import call
from tests.oracle import DEVICES, TOLERANCE, assert_close, make_conv_inputs

pytestmark = pytest.mark.parametrize("device", DEVICES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "weight", "bias", "initial_state")


def expected(x: dict, silu: bool, dy=None, ds=None) -> dict:
    wide = {n: None if x[n] is None else x[n].detach().cpu().double().requires_grad_() for n in NAMES}
    bounds = None if x["cu_seqlens"] is None else x["cu_seqlens"].cpu()
    y, state = reference.causal_conv1d(**wide, activation="silu" if silu else None, cu_seqlens=bounds)
    results = {"y": y.detach(), "final_state": state.detach()}
    if dy is not None:
        loss = (y * dy.cpu().double()).sum() + (0 if ds is None else (state * ds.cpu().double()).sum())
        real = {n: t for n, t in wide.items() if t is not None}
        results |= {"d" + n: g for n, g in zip(real, torch.autograd.grad(loss, list(real.values())))}
    return results


def run(x: dict, silu: bool, dy, ds) -> dict:
    inputs = [x[n] for n in NAMES]
    y, state = call("causal_conv1d:forward", *inputs, x["cu_seqlens"], silu, True).result
    grads = call("causal_conv1d:backward", dy, ds, *inputs, x["cu_seqlens"], silu).result
    for n, grad in zip(NAMES, grads):
        assert grad.is_contiguous() and grad.dtype == (x["weight"] if x[n] is None else x[n]).dtype
        assert x[n] is not None or grad.shape[0] == 0
    return {"y": y, "final_state": state, **{"d" + n: g for n, g in zip(NAMES, grads) if x[n] is not None}}


def check(x: dict, silu: bool = True, final_state_gradient: bool = True) -> dict:
    generator = torch.Generator().manual_seed(3)
    N = x["x"].shape[0] if x["cu_seqlens"] is None else len(x["cu_seqlens"]) - 1
    D, W = x["weight"].shape
    dy = torch.randn(x["x"].shape, generator=generator).to(x["x"])
    ds = torch.randn(N, D, W - 1, generator=generator).to(x["x"]) if final_state_gradient else None
    got, want = run(x, silu, dy, ds), expected(x, silu, dy, ds)
    assert got.keys() == want.keys()
    tolerance = TOLERANCE[x["x"].dtype]
    for n in want:
        assert_close(got[n], want[n], tolerance.grads if n.startswith("d") else tolerance.values, n)
    return got


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_dtypes(device, dtype, W):
    check(make_conv_inputs(2, 21, 40, W, dtype, device, initial_state=True), silu=W != 3)


@pytest.mark.parametrize("T", [1, 2, 3, 16, 17, 67])
@pytest.mark.parametrize("initial_state", [False, True])
def test_lengths(device, T, initial_state):
    x = make_conv_inputs(1, T, 5, 4, device=device, initial_state=initial_state, bias=T != 17)
    check(x, final_state_gradient=T != 67)


def test_more_channels_than_a_tile(device):
    check(make_conv_inputs(1, 5, 300, 4, torch.bfloat16, device, initial_state=True))


@pytest.mark.parametrize("bounds", [[0, 0, 1, 3, 3, 70], [0, 1, 2, 4, 7, 7, 23, 24]], ids=lambda b: str(len(b) - 1))
@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_packed_sequences(device, bounds, initial_state, wide):
    bounds = torch.tensor(bounds) if wide else bounds
    options = {"initial_state": initial_state, "cu_seqlens": bounds}
    check(make_conv_inputs(1, int(bounds[-1]), 9, 4, device=device, **options))


def test_neighbours_and_the_tail_leak_nothing(device):
    x = make_conv_inputs(1, 30, 9, 4, device=device, initial_state=True, cu_seqlens=[0, 5, 9, 24])
    dy, ds = torch.ones_like(x["x"]), torch.ones_like(x["initial_state"])
    clean = run(x, True, dy, ds)
    spoiled = {n: t if n == "cu_seqlens" else t.clone() for n, t in x.items()}
    for t in (spoiled["x"], dy):
        t[:, 24:] = float("nan")
    got = run(spoiled, True, dy, ds)
    assert not got["y"][:, 24:].any() and not got["dx"][:, 24:].any()
    assert all(torch.equal(got[n], clean[n]) for n in clean)
    for t in (spoiled["x"], dy):
        t[:, 5:9] = float("nan")
    spoiled["initial_state"][1], ds[1] = float("nan"), float("nan")
    got = run(spoiled, True, dy, ds)
    for n in ("y", "dx"):
        assert torch.equal(got[n][:, :5], clean[n][:, :5]) and torch.equal(got[n][:, 9:], clean[n][:, 9:]), n
    for n in ("final_state", "dinitial_state"):
        assert torch.equal(got[n][[0, 2]], clean[n][[0, 2]]), n


@pytest.mark.parametrize("layout", ["projection", "time_last", "last_strided"])
def test_strides_as_they_come(device, layout):
    x = make_conv_inputs(2, 19, 24, 4, torch.bfloat16, device, initial_state=True)
    for n in ("weight", "initial_state"):
        x[n] = x[n].mT.contiguous().mT
    x["bias"] = torch.stack([x["bias"], x["bias"] + 1], -1)[:, 0]
    if layout == "projection":
        x["x"] = torch.cat([x["x"][..., :3], x["x"], x["x"]], -1)[..., 3:27]
    elif layout == "time_last":
        x["x"] = x["x"].mT.contiguous().mT
    else:
        x["x"] = torch.stack([x["x"], x["x"] + 1], -1)[..., 0]
    assert not any(x[n].is_contiguous() for n in NAMES)
    check(x)


def test_expanded_gradient(device):
    x = make_conv_inputs(1, 19, 24, 4, device=device)
    dy = torch.ones((), device=device).expand_as(x["x"])
    got, want = run(x, True, dy, None), expected(x, True, dy)
    for n in want:
        assert_close(got[n], want[n], 5e-5, n)


def test_without_final_state(device):
    x = make_conv_inputs(1, 19, 24, 4, device=device)
    y, state = call("causal_conv1d:forward", *(x[n] for n in NAMES), None, False, False).result
    assert state.shape == (0, 24, 3)
    assert_close(y, expected(x, False)["y"], 1e-5, "y")


def test_same_bits_twice_and_split(device):
    x = make_conv_inputs(1, 37, 9, 4, torch.bfloat16, device, initial_state=True)
    dy, ds = torch.ones_like(x["x"]), torch.ones_like(x["initial_state"])
    first, second = run(x, True, dy, ds), run(x, True, dy, ds)
    assert all(torch.equal(first[n], second[n]) for n in first)
    head = run({**x, "x": x["x"][:, :18]}, True, dy[:, :18], ds)
    tail = run({**x, "x": x["x"][:, 18:], "initial_state": head["final_state"]}, True, dy[:, 18:], ds)
    assert torch.equal(torch.cat([head["y"], tail["y"]], 1), first["y"])
    assert torch.equal(tail["final_state"], first["final_state"])


@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["dense", "packed"])
def test_no_tokens_hand_the_state_through(device, bounds):
    x = make_conv_inputs(1, 0, 9, 4, device=device, initial_state=True, cu_seqlens=bounds)
    ds = torch.randn(x["initial_state"].shape, generator=torch.Generator().manual_seed(0)).to(device)
    got = run(x, True, x["x"], ds)
    assert torch.equal(got["final_state"], x["initial_state"]) and torch.equal(got["dinitial_state"], ds)
    assert not got["dweight"].any() and not got["dbias"].any()


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_step_on_a_pool(device, dtype, T, W):
    """Padding (-1) and indices outside the pool give zeros and touch no window; a window may be strided."""
    x = make_conv_inputs(5, T, 40, W, dtype, device)
    generator = torch.Generator().manual_seed(5)
    pool = torch.randn(4, W - 1, 40, generator=generator).to(device, dtype).mT
    indices = torch.tensor([2, -1, 0, 4, -9], dtype=torch.int32, device=device)
    before = pool.clone()
    stepped = call("causal_conv1d:update_", x["x"], x["weight"], x["bias"], pool, indices, True)
    y, after = stepped.result, stepped.args[3]
    wanted = expected({**x, "initial_state": before[[2, 0, 0, 0, 0]]}, True)
    for b, slot in enumerate(indices.tolist()):
        if 0 <= slot < 4:
            assert_close(y[b], wanted["y"][b], TOLERANCE[dtype].values, f"y of row {b}")
            assert torch.equal(after[slot].cpu(), wanted["final_state"][b].to(dtype))
        else:
            assert not y[b].any()
    assert torch.equal(after[[1, 3]], before[[1, 3]])


def test_step_without_indices_or_bias(device):
    x = make_conv_inputs(3, 2, 9, 4, device=device, bias=False, initial_state=True)
    stepped = call("causal_conv1d:update_", x["x"], x["weight"], None, x["initial_state"].clone(), None, False)
    want = expected(x, False)
    assert_close(stepped.result, want["y"], 1e-5, "y")
    assert torch.equal(stepped.args[3].cpu(), want["final_state"].float())
