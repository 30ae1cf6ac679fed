"""The kernels of gated linear attention at kernel level: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_triton_segments import segment_of
from tests.kernels.triton_rule import (
    DTYPES,
    LAYOUTS,
    LOW,
    RECURRENT,
    TOKENS,
    backward,
    check_chunk,
    check_recurrent,
    chunk,
    forward,
    linear,
    scale_of,
)
from tests.oracle import DEVICES, assert_all_close, cotangents, expected, make_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
FIRST_TWO = (torch.float32, torch.bfloat16)


def inputs(*sizes, **options) -> dict:
    return linear(make_inputs(*sizes, **options))


@pytest.mark.parametrize("B, T, H, HV, K, V", [(1, 63, 2, 2, 16, 32), (2, 130, 1, 2, 32, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_dtypes(device, dtype, B, T, H, HV, K, V):
    check_chunk(inputs(B, T, H, HV, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("T", [2, 64, 65, 128])
def test_lengths_around_a_chunk(device, T):
    check_chunk(inputs(1, T, 1, 1, 16, 16, device=device, initial_state=True))


@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
def test_many_value_heads_on_one_key_head(device, dtype):
    """More than one program adds up for dq and dk, and decay_kernel takes more than one block of heads."""
    check_chunk(inputs(1, 66, 1, 19, 16, 16, dtype, device))


@pytest.mark.parametrize("strength", [0.0, 1e-2, 20.0])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounded_operands_at_any_gate(device, dtype, strength):
    """The gradient of g is a difference of sums that cancel the more, the weaker the gates are."""
    x = inputs(1, 130, 1, 3, 128, 64, dtype, device, initial_state=True)
    check_chunk({**x, "g": x["g"] * strength})


@pytest.mark.parametrize("K, V", [(24, 40), (100, 72), (136, 20)])
@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
def test_odd_head_dimensions(device, dtype, K, V):
    check_chunk(inputs(1, 66, 1, 1, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("K, V, dtype", [(8, 24, torch.bfloat16), (1, 1, torch.float16), (1, 1, torch.float32)])
def test_heads_narrower_than_a_tensor_core(device, K, V, dtype):
    check_chunk(inputs(1, 66, 1, 2, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("bounds", [None, [0, 1], [0, 0, 1, 1]], ids=["dense", "packed", "empty neighbours"])
def test_one_token(device, bounds):
    check_chunk(inputs(1, 1, 1, 8, 16, 24, torch.float16, device, initial_state=True, cu_seqlens=bounds))


def test_wide_heads(device):
    check_chunk(inputs(1, 66, 1, 1, 256, 512, torch.bfloat16, device, initial_state=True))


@pytest.mark.parametrize("bounds", [[0, 0, 1, 66, 66, 130], [0, 64, 128]], ids=lambda b: "-".join(map(str, b)))
@pytest.mark.parametrize("dtype", FIRST_TWO, ids=str)
@pytest.mark.parametrize("shortest", [None, 1], ids=["whole", "segments"])
def test_packed_sequences(device, dtype, bounds, shortest):
    x = inputs(1, bounds[-1], 1, 1, 16, 24, dtype, device, initial_state=True, cu_seqlens=bounds)
    check_chunk(x, shortest_segment=shortest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_two_chunks_and_a_short_last_one(device, dtype):
    x = inputs(1, 4 * 64 + 7, 1, 2, 24, 40, dtype, device, initial_state=True)
    check_chunk(x, shortest_segment=2)


def test_strong_gates_end_a_map(device):
    x = inputs(1, 200, 1, 1, 16, 16, device=device, initial_state=True)
    x["g"][:, [3, 64, 130]] = -1e4
    check_chunk(x, shortest_segment=1)


def test_the_tail_and_the_neighbours(device):
    """NaN in one sequence and after the last: the others keep their bits, the tail gives zeros."""
    bounds = [0, 40, 70, 90]
    x = inputs(1, 97, 1, 2, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    clean = chunk(x, do, ds)
    spoiled = {n: t if n == "cu_seqlens" else t.clone() for n, t in x.items()}
    do, ds = do.clone(), ds.clone()
    for t in (*(spoiled[n] for n in TOKENS if n in x), do):
        t[:, 40:70], t[:, 90:] = float("nan"), float("nan")
    spoiled["initial_state"][1], ds[1] = float("nan"), float("nan")
    got = chunk(spoiled, do, ds)
    for n in clean:
        if n in ("final_state", "dinitial_state"):
            assert torch.equal(got[n][[0, 2]], clean[n][[0, 2]]), n
            continue
        assert torch.equal(got[n][:, :40], clean[n][:, :40]) and torch.equal(got[n][:, 70:90], clean[n][:, 70:90]), n
        assert not got[n][:, 90:].any() and not clean[n][:, 90:].any(), n
    assert got["o"][:, 40:70].isnan().all()


@pytest.mark.parametrize("shortest", [None, 1], ids=["whole", "segments"])
def test_tokens_of_no_sequence_are_zeros(device, shortest):
    x = inputs(1, 150, 1, 1, 16, 16, device=device, initial_state=True, cu_seqlens=[0, 0])
    do, ds = cotangents(x)
    got = chunk(x, do, ds, shortest_segment=shortest)
    assert torch.equal(got.pop("final_state"), x["initial_state"]) and torch.equal(got.pop("dinitial_state"), ds)
    assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["dense", "packed"])
def test_no_tokens_hand_the_state_through(device, bounds):
    x = inputs(1, 0, 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    got = chunk(x, do, ds)
    assert torch.equal(got["final_state"], x["initial_state"]) and torch.equal(got["dinitial_state"], ds)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("check", [check_chunk, check_recurrent])
def test_strides_as_they_come(device, check, layout):
    x = layout(inputs(2, 66, 2, 2, 24, 16, torch.bfloat16, device, initial_state=True))
    x["initial_state"] = x["initial_state"].mT.contiguous().mT
    assert not any(x[n].is_contiguous() for n in ("q", "k", "v", "g", "initial_state"))
    check(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_gates_between_weak_ones(device, dtype):
    """A strong gate must not cost the digits of the weak ones after it in the same chunk: a sum is two numbers."""
    x = inputs(1, 130, 1, 1, 16, 16, dtype, device, initial_state=True)
    x["g"][:, [3, 64, 100]] = -1e4
    check_chunk(x)


@pytest.mark.parametrize("gate", [-1e4, float("-inf")])
def test_strong_gates_everywhere(device, gate):
    """With exp(g) = 0 the past is gone, exactly: no NaN, and no trace of the state."""
    x = inputs(1, 70, 1, 2, 16, 16, device=device, initial_state=True)
    x["g"] = torch.full_like(x["g"], -1e4)
    do, ds = cotangents(x)
    want = expected(x, scale_of(x), do=do, ds=ds)
    x["g"] = torch.full_like(x["g"], gate)
    got = chunk(x, do, ds)
    assert not got.pop("dinitial_state").any() and not want.pop("dinitial_state").any()
    assert got.pop("dg").abs().max() <= 1e-4 and not want.pop("dg").any()
    assert_all_close(got, want, torch.float32)
    assert torch.equal(forward({**x, "initial_state": None})["o"], got["o"])


def test_gates_that_are_not_numbers_show(device):
    x = inputs(1, 70, 1, 1, 16, 16, torch.bfloat16, device)
    x["g"][:, 66] = float("nan")
    o = forward(x)["o"]
    assert o[:, :64].isfinite().all() and o[:, 66:].isnan().all()


@pytest.mark.parametrize("initial_state", [False, True])
def test_without_final_state(device, initial_state):
    x = inputs(1, 66, 1, 2, 16, 16, device=device, initial_state=initial_state)
    do, ds = cotangents(x)
    want = expected(x, scale_of(x), do=do, ds=ds * 0)
    got = {**forward(x, output_final_state=False), **backward(x, do, None)}
    assert_all_close(got, {n: want[n] for n in got}, torch.float32)


def test_batch_invariant_keeps_sequences_whole(device):
    """The bits of a sequence alone, or of one token, are those in company."""
    bounds = [0, 150, 151, 200]
    x = inputs(1, 200, 1, 1, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)
    whole = {"shortest_segment": 1, "batch_invariant": True}
    assert segment_of(x, **whole) is None and segment_of(x, shortest_segment=1) == 1
    company = chunk(x, do, ds, **whole)
    for n, (begin, end) in enumerate(((0, 150), (150, 151))):
        here, state = slice(begin, end), slice(n, n + 1)
        alone = {m: x[m][:, here] for m in TOKENS if m in x}
        alone |= {"initial_state": x["initial_state"][state], "cu_seqlens": None}
        single = chunk(alone, do[:, here], ds[state], **whole)
        for m, t in single.items():
            assert torch.equal(t, company[m][state] if "state" in m else company[m][:, here]), m


@pytest.mark.parametrize("shortest", [None, 1], ids=["whole", "segments"])
def test_same_bits_twice(device, shortest):
    x = inputs(1, 140, 1, 9, 16, 16, torch.bfloat16, device, initial_state=True)
    do, ds = cotangents(x)
    first, second = (chunk(x, do, ds, shortest_segment=shortest) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("B, T, H, HV, K, V", [(3, 1, 1, 2, 16, 16), (2, 9, 1, 3, 100, 72)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_by_token(device, dtype, B, T, H, HV, K, V):
    check_recurrent(inputs(B, T, H, HV, K, V, dtype, device, initial_state=True))


def test_token_by_token_packed(device):
    x = inputs(1, 16, 1, 2, 16, 24, device=device, cu_seqlens=[0, 0, 1, 9, 9, 14])
    o = forward(x, RECURRENT[False])["o"]
    want = expected({n: t[:, :14] if n in TOKENS else t for n, t in x.items()}, scale_of(x))["o"]
    assert_all_close({"o": o[:, :14]}, {"o": want}, torch.float32)
    assert not o[:, 14:].any()
