"""The chunk kernels, forward and backward, at kernel level: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gdn_ops.kernels.triton.chunk_forward import FEW
from tests.kernels.triton_rule import (
    DTYPES,
    LAYOUTS,
    LOW,
    RECURRENT,
    backward,
    check_chunk,
    chunk,
    forward,
    scale_of,
)
from tests.oracle import DEVICES, assert_all_close, assert_close, cotangents, expected, make_inputs, tolerance_of

pytestmark = pytest.mark.parametrize("device", DEVICES)
FIRST_TWO = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("B, T, H, HV, K, V", [(1, 63, 2, 2, 16, 32), (1, 130, 1, 2, 32, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_dtypes(device, dtype, B, T, H, HV, K, V):
    check_chunk(make_inputs(B, T, H, HV, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("T", [2, 64, 65, 128])
def test_lengths_around_a_chunk(device, T):
    check_chunk(make_inputs(1, T, 1, 1, 16, 16, device=device, initial_state=True))


@pytest.mark.parametrize("B, H, HV", [(2, 2, 2), (1, 2, 6)])
def test_grouped_values_without_initial_state(device, B, H, HV):
    check_chunk(make_inputs(B, 66, H, HV, 16, 16, torch.bfloat16, device))


@pytest.mark.parametrize("K, V", [(24, 40), (40, 24), (100, 72), (136, 20)])
@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
def test_odd_head_dimensions(device, dtype, K, V):
    check_chunk(make_inputs(1, 66, 1, 1, K, V, dtype, device, initial_state=True))


def test_head_dimensions_of_one(device):
    """All unit keys of one dimension are the same key, up to its sign."""
    check_chunk(make_inputs(1, 66, 1, 1, 1, 1, device=device, initial_state=True))


@pytest.mark.parametrize("K, V, dtype", [(8, 24, torch.bfloat16), (24, 8, torch.float16), (1, 1, torch.float16)])
def test_heads_narrower_than_a_tensor_core(device, K, V, dtype):
    """They are computed in fp32, and come back in their own dtype."""
    check_chunk(make_inputs(1, 66, 1, 2, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("bounds", [None, [0, 1], [0, 0, 1, 1]], ids=["dense", "packed", "empty neighbours"])
def test_one_token(device, bounds):
    check_chunk(make_inputs(1, 1, 1, 2, 16, 24, torch.float16, device, initial_state=True, cu_seqlens=bounds))


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 8]], ids=["dense", "packed"])
def test_few_tokens_are_the_recurrent_kernels(device, bounds):
    """Two tokens' worth of rounded numbers may be off together by more than the table allows."""
    x = make_inputs(1, FEW, 1, 2, 128, 64, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    few, recurrent = forward(x), forward(x, RECURRENT[True])
    assert all(torch.equal(few[name], recurrent[name]) for name in few)
    for seed in range(3):
        check_chunk(make_inputs(1, 2, 1, 1, 128, 128, torch.bfloat16, device, seed=seed))


@pytest.mark.parametrize("K, V, dtype", [(192, 384, torch.float32), (256, 512, torch.bfloat16)])
def test_wide_heads(device, dtype, K, V):
    check_chunk(make_inputs(1, 66, 1, 1, K, V, dtype, device, initial_state=True))


BOUNDS = ([0, 0, 1, 66, 66, 130], [0, 64, 128], [0, 1, 2, 3, 3, 4, 69, 69, 70, 72])


@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda b: "-".join(map(str, b)))
@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
def test_packed_sequences(device, dtype, bounds):
    check_chunk(make_inputs(1, bounds[-1], 1, 1, 16, 24, dtype, device, initial_state=True, cu_seqlens=bounds))


def test_packed_sequences_int64_without_state(device):
    bounds = torch.tensor([0, 3, 3, 100])
    check_chunk(make_inputs(1, 100, 1, 2, 16, 16, device=device, cu_seqlens=bounds))


def test_packed_equals_separate(device):
    bounds = [0, 37, 37, 102, 103]
    x = make_inputs(1, bounds[-1], 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    got = chunk(x, do, ds)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        here, state = slice(begin, end), slice(n, n + 1)
        part = {name: t[:, here] for name, t in x.items() if name in ("q", "k", "v", "g", "beta")}
        part |= {"initial_state": x["initial_state"][state], "cu_seqlens": None}
        want = chunk(part, do[:, here], ds[state])
        states = ("final_state", "dinitial_state")
        assert_all_close({m: got[m][state] if m in states else got[m][:, here] for m in got}, want, torch.float32)


def test_neighbours_and_the_tail_leak_nothing(device):
    """NaN in one sequence, and in the tokens after the last: the others keep their bits, the tail gives zeros."""
    bounds = [0, 40, 70, 90]
    x = make_inputs(1, 97, 1, 2, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    clean = chunk(x, do, ds)
    spoiled = {n: t if n == "cu_seqlens" else t.clone() for n, t in x.items()}
    do, ds = do.clone(), ds.clone()
    for t in (*(spoiled[n] for n in ("q", "k", "v", "g", "beta")), do):
        t[:, 40:70], t[:, 90:] = float("nan"), float("nan")
    spoiled["initial_state"][1], ds[1] = float("nan"), float("nan")
    got = chunk(spoiled, do, ds)
    for n in clean:
        if n in ("final_state", "dinitial_state"):
            assert torch.equal(got[n][[0, 2]], clean[n][[0, 2]]), n
            continue
        assert torch.equal(got[n][:, :40], clean[n][:, :40]) and torch.equal(got[n][:, 70:90], clean[n][:, 70:90]), n
        assert not got[n][:, 90:].any() and not clean[n][:, 90:].any(), n
    whole = {n: t[:, :90] if n in ("q", "k", "v", "g", "beta") else t for n, t in x.items()}
    do, ds = (c.to(device) for c in cotangents(x))
    want = expected(whole, scale_of(x), do=do[:, :90], ds=ds)
    assert_all_close({n: t if "state" in n else t[:, :90] for n, t in clean.items()}, want, torch.bfloat16)


def test_tokens_of_no_sequence_are_zeros(device):
    """All sequences are empty, and there are tokens."""
    x = make_inputs(1, 70, 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=[0, 0, 0])
    do, ds = cotangents(x)
    got = chunk(x, do, ds)
    assert torch.equal(got.pop("final_state"), x["initial_state"]) and torch.equal(got.pop("dinitial_state"), ds)
    assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["dense", "packed"])
def test_no_tokens_hand_the_state_through(device, bounds):
    x = make_inputs(1, 0, 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    got = chunk(x, do, ds)
    assert torch.equal(got["final_state"], x["initial_state"]) and torch.equal(got["dinitial_state"], ds)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
def test_strides_as_they_come(device, dtype, layout):
    x = layout(make_inputs(2, 66, 2, 2, 24, 16, dtype, device, initial_state=True))
    x["initial_state"] = x["initial_state"].mT.contiguous().mT
    assert not any(x[n].is_contiguous() for n in ("q", "k", "v", "g", "beta", "initial_state"))
    check_chunk(x)


def test_expanded_gradients(device):
    """``o.sum().backward()`` sends gradients of stride 0."""
    x = make_inputs(1, 66, 1, 2, 16, 16, device=device)
    check_chunk(x, do=torch.ones((), device=device).expand_as(x["v"]))


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gates_in_low_precision(device, gate_dtype):
    x = make_inputs(1, 66, 1, 2, 16, 16, torch.bfloat16, device)
    x.update(g=x["g"].to(gate_dtype), beta=x["beta"].to(gate_dtype))
    check_chunk(x)


@pytest.mark.parametrize("initial_state", [False, True])
def test_without_final_state(device, initial_state):
    x = make_inputs(1, 66, 1, 2, 16, 16, device=device, initial_state=initial_state)
    do, ds = cotangents(x)
    want = expected(x, scale_of(x), do=do, ds=ds * 0)
    got = {**forward(x, output_final_state=False), **backward(x, do, None)}
    assert_all_close(got, {n: want[n] for n in got}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_gates_between_weak_ones(device, dtype):
    """A strong gate must not cost the digits of the weak ones after it in the same chunk."""
    x = make_inputs(1, 130, 1, 1, 16, 16, dtype, device, initial_state=True)
    x["g"][:, [3, 64, 100]] = -1e4
    check_chunk(x)


@pytest.mark.parametrize("gate", [-1e4, float("-inf")])
def test_strong_gates_everywhere(device, gate):
    """With exp(g) = 0 the past is gone, exactly: no NaN, and no trace of the state."""
    x = make_inputs(1, 70, 1, 2, 16, 16, device=device, initial_state=True)
    x["g"] = torch.full_like(x["g"], -1e4)
    do, ds = cotangents(x)
    want = expected(x, scale_of(x), do=do, ds=ds)
    x["g"] = torch.full_like(x["g"], gate)
    got = chunk(x, do, ds)
    assert not got.pop("dinitial_state").any() and not want.pop("dinitial_state").any()
    assert got.pop("dg").abs().max() <= 1e-4 and not want.pop("dg").any()
    assert_all_close(got, want, torch.float32)
    assert torch.equal(forward({**x, "initial_state": None})["o"], got["o"])


def _one_key(dtype, device):
    """The triangular system at its worst: one key written over and over, beta near 1, no forgetting."""
    x = make_inputs(1, 130, 1, 1, 16, 16, dtype, device, initial_state=True)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.full_like(x["beta"], 0.999)
    x["g"] = torch.full_like(x["g"], -1e-6)
    return x


def test_repeated_identical_keys(device):
    check_chunk(_one_key(torch.float32, device))


# What is written at a token is then a difference of neighbouring values, the state their sum, and the gradient of a
# value the reverse: rounding inverse, U, V' and dV' to 16 bits costs about sqrt(C) = 8 times what it costs elsewhere.
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_repeated_identical_keys_in_low_precision_lose_a_digit_at_most(device, dtype):
    x = _one_key(dtype, device)
    do, ds = cotangents(x)
    got, want = chunk(x, do, ds), expected(x, scale_of(x), do=do, ds=ds)
    for n in want:
        assert_close(got[n], want[n], 10 * tolerance_of(n, dtype), n)


def test_negative_eigenvalues(device):
    x = make_inputs(1, 130, 1, 1, 16, 16, torch.bfloat16, device, initial_state=True)
    x["beta"] = x["beta"] * 2
    check_chunk(x)


@pytest.mark.parametrize("bounds", [None, [0, 30, 30, 97]], ids=["dense", "packed"])
def test_same_bits_twice(device, bounds):
    x = make_inputs(1, 97, 1, 2, 24, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    first, second = chunk(x, do, ds), chunk(x, do, ds)
    assert all(torch.equal(first[n], second[n]) for n in first)
