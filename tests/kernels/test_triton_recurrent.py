"""The token-by-token kernels, functional and in place on a pool: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.kernels.interpreter import call
from tests.kernels.triton_rule import DTYPES, LAYOUTS, check_recurrent, forward, scale_of
from tests.oracle import DEVICES, TOLERANCE, assert_all_close, assert_close, expected, make_inputs

pytestmark = pytest.mark.parametrize("device", DEVICES)
RECURRENT = "recurrent:recurrent_forward"


@pytest.mark.parametrize("B, T, H, HV, K, V", [(3, 1, 1, 2, 16, 16), (1, 5, 2, 2, 24, 40), (2, 9, 1, 3, 100, 72)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes(device, dtype, B, T, H, HV, K, V):
    check_recurrent(make_inputs(B, T, H, HV, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("K, V", [(1, 1), (192, 384), (256, 512)])
def test_narrow_and_wide_heads(device, K, V):
    check_recurrent(make_inputs(1, 3, 1, 1, K, V, torch.bfloat16, device, initial_state=True))


@pytest.mark.parametrize("bounds", [[0, 0, 1, 9, 9, 14], [0, 1, 2, 3, 3, 4, 6]], ids=lambda b: "-".join(map(str, b)))
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_packed_sequences_without_state(device, bounds, wide):
    bounds = torch.tensor(bounds) if wide else bounds
    check_recurrent(make_inputs(1, int(bounds[-1]), 1, 2, 16, 24, device=device, cu_seqlens=bounds))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("state", ["key_last", "sliced"])
def test_strides_as_they_come(device, layout, state):
    x = layout(make_inputs(2, 4, 2, 2, 24, 16, torch.bfloat16, device, initial_state=True))
    s = x["initial_state"]
    x["initial_state"] = s.mT.contiguous().mT if state == "key_last" else torch.cat([s, s * 0 + 9], -1)[..., :16]
    assert not any(x[n].is_contiguous() for n in ("q", "k", "v", "g", "beta", "initial_state"))
    check_recurrent(x)


def test_strong_gates_and_repeated_keys(device):
    x = make_inputs(1, 40, 1, 1, 16, 16, torch.bfloat16, device, initial_state=True)
    x["k"] = x["k"][:, :1].expand_as(x["k"])
    x["beta"] = torch.full_like(x["beta"], 0.999)
    x["g"] = torch.full_like(x["g"], -1e-6)
    x["g"][:, 11] = -1e4
    check_recurrent(x)


def test_without_final_state_and_tokens_after_the_last_sequence(device):
    x = make_inputs(1, 9, 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=[0, 2, 7])
    got = forward(x, RECURRENT, output_final_state=False)
    assert not got["o"][:, 7:].any()
    whole = {n: t[:, :7] if n in ("q", "k", "v", "g", "beta") else t for n, t in x.items()}
    assert_all_close({"o": got["o"][:, :7]}, {"o": expected(whole, scale_of(x))["o"]}, torch.float32)


def test_same_bits_alone_and_in_company(device):
    x = make_inputs(1, 11, 1, 2, 16, 16, torch.bfloat16, device, initial_state=True, cu_seqlens=[0, 4, 4, 11])
    first, second = forward(x, RECURRENT), forward(x, RECURRENT)
    assert all(torch.equal(first[n], second[n]) for n in first)
    alone = {n: t[:, 4:] if n in ("q", "k", "v", "g", "beta") else None for n, t in x.items()}
    got = forward({**alone, "initial_state": x["initial_state"][2:]}, RECURRENT)
    assert torch.equal(got["o"], first["o"][:, 4:]) and torch.equal(got["final_state"][0], first["final_state"][2])


@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["dense", "packed"])
def test_no_tokens_hand_the_state_through(device, bounds):
    x = make_inputs(1, 0, 1, 2, 16, 16, device=device, initial_state=True, cu_seqlens=bounds)
    assert torch.equal(forward(x, RECURRENT)["final_state"], x["initial_state"])


def make_pool(P, HV, K, V, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(P, HV, K, V, generator=generator, dtype=torch.float64).to(device, dtype)


def check_update(x, pool, indices, tolerance):
    """Outputs and named slots against the specification; no other slot, and no gap between slots, may change a bit."""
    x = {**x, "initial_state": None}
    base = pool if pool._base is None else pool._base
    arguments = [x[n] for n in ("q", "k", "v", "g", "beta")]
    before, gaps = pool.clone(), base.clone()
    call_ = call("recurrent:recurrent_update_", *arguments, pool, indices, None, x["cu_seqlens"], scale_of(x))
    o, after = call_.result, call_.args[5]
    bounds = None if x["cu_seqlens"] is None else x["cu_seqlens"].tolist()
    N = x["q"].shape[0] if bounds is None else len(bounds) - 1
    slots = list(range(N)) if indices is None else indices.tolist()
    real = [slot if 0 <= slot < len(pool) else None for slot in slots]
    want = expected({**x, "initial_state": before[[slot or 0 for slot in real]].float()}, scale_of(x))
    for n, slot in enumerate(real):
        rows = (n,) if bounds is None else (0, slice(bounds[n], bounds[n + 1]))
        if slot is None:
            assert not o[rows].any()
        else:
            assert_close(o[rows], want["o"][rows], tolerance, f"o of sequence {n}")
            assert_close(after[slot], want["final_state"][n], tolerance, f"slot {slot}")
    others = [p for p in range(len(pool)) if p not in real]
    assert torch.equal(after[others], before[others])
    if pool._base is not None and pool.is_cuda:
        pool.copy_(before)
        assert torch.equal(base, gaps)
    return o


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(device, dtype, T):
    indices = torch.tensor([4, -1, 0, 5, -7, 2**31 - 1], dtype=torch.int32, device=device)
    x = make_inputs(6, T, 1, 2, 24, 40, dtype, device)
    check_update(x, make_pool(5, 2, 24, 40, device), indices, TOLERANCE[dtype].values)


@pytest.mark.parametrize("indices", [None, [3, -1, 1]])
def test_pool_with_packed_sequences(device, indices):
    indices = None if indices is None else torch.tensor(indices, dtype=torch.int32, device=device)
    x = make_inputs(1, 8, 1, 2, 16, 16, device=device, cu_seqlens=[0, 3, 3, 8])
    check_update(x, make_pool(5, 2, 16, 16, device), indices, 1e-5)


def test_tokens_after_the_last_sequence_are_zeros(device):
    x = make_inputs(1, 9, 1, 2, 16, 16, device=device, cu_seqlens=[0, 2, 7])
    arguments = [x[n] for n in ("q", "k", "v", "g", "beta")]
    pool = make_pool(2, 2, 16, 16, device)
    o = call("recurrent:recurrent_update_", *arguments, pool, None, None, x["cu_seqlens"], 1.0).result
    assert not o[:, 7:].any() and o[:, :7].any(-1).all()


def strided(pool, layout):
    if layout == "key_last":
        return pool.mT.contiguous().mT
    if layout == "interleaved":
        return torch.stack([pool, pool + 1], -1)[..., 0]
    return torch.stack([pool, pool + 1], 1).flatten(0, 1)[::2]


POOL_LAYOUTS = ["key_last", "interleaved", "every_other_slot"]


@pytest.mark.parametrize("layout", POOL_LAYOUTS)
def test_strided_pool(device, layout):
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    x = make_inputs(2, 1, 1, 2, 24, 16, torch.bfloat16, device)
    pool = strided(make_pool(4, 2, 24, 16, device), layout)
    assert not pool.is_contiguous()
    check_update(x, pool, indices, TOLERANCE[torch.bfloat16].values)


@pytest.mark.parametrize("K, V", [(16, 72), (100, 40), (128, 128), (8, 16), (256, 136)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pool_in_low_precision(device, dtype, K, V):
    """One token reads a state of its own dtype with tensor cores, where the heads are as wide as those take."""
    indices = torch.tensor([3, -1, 0, 4], dtype=torch.int64, device=device)
    x = make_inputs(4, 1, 1, 2, K, V, dtype, device)
    pool = make_pool(4, 2, K, V, device, dtype)
    o = check_update(x, pool.clone(), indices, TOLERANCE[dtype].values)
    alone = {n: None if t is None else t[2:3] for n, t in x.items()}
    assert torch.equal(check_update(alone, pool, indices[2:3], TOLERANCE[dtype].values), o[2:3])


@pytest.mark.parametrize("layout", [None, *POOL_LAYOUTS])
@pytest.mark.parametrize("inputs", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_pool_in_low_precision(device, inputs, layout):
    x = inputs(make_inputs(2, 1, 1, 2, 24, 16, torch.bfloat16, device))
    pool = make_pool(4, 2, 24, 16, device, torch.bfloat16)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    check_update(x, pool if layout is None else strided(pool, layout), indices, TOLERANCE[torch.bfloat16].values)


def test_pool_of_another_dtype_than_the_tokens(device):
    x = make_inputs(2, 1, 1, 2, 32, 16, torch.bfloat16, device)
    check_update(x, make_pool(2, 2, 32, 16, device, torch.float16), None, TOLERANCE[torch.bfloat16].values)


def check_token_states(x, pool, indices, token_indices, values, states):
    """Outputs and the slot of each token against the specification on the tokens up to it; no other slot changes.

    ``values`` bounds the outputs, ``states`` what is left in the pool.
    """
    bounds = [[n, 0, x["q"].shape[1]] for n in range(x["q"].shape[0])]
    if x["cu_seqlens"] is not None:
        ends = x["cu_seqlens"].tolist()
        bounds = [[0, *pair] for pair in pairwise(ends)]
    base = pool if pool._base is None else pool._base
    arguments = [x[n] for n in ("q", "k", "v", "g", "beta")]
    before, gaps = pool.clone(), base.clone()
    slots = (indices, token_indices)
    call_ = call("recurrent:recurrent_update_", *arguments, pool, *slots, x["cu_seqlens"], scale_of(x))
    o, after = call_.result, call_.args[5]
    written = set()
    for (b, begin, end), slot in zip(bounds, range(len(bounds)) if indices is None else indices.tolist()):
        if not 0 <= slot < len(pool):
            assert not o[b, begin:end].any()
            continue
        for t in range(begin, end):
            prefix = {n: y[b : b + 1, begin : t + 1] for n, y in x.items() if n not in ("cu_seqlens", "initial_state")}
            prefix.update(cu_seqlens=None, initial_state=before[slot : slot + 1])
            want, kept = expected(prefix, scale_of(x)), int(token_indices[b, t])
            assert_close(o[b, t], want["o"][0, -1], values, f"o of token {t}")
            if 0 <= kept < len(pool):
                assert_close(after[kept], want["final_state"][0], states, f"slot {kept}")
                written.add(kept)
    others = [p for p in range(len(pool)) if p not in written]
    assert written and torch.equal(after[others], before[others])
    if pool._base is not None and pool.is_cuda:
        pool.copy_(before)
        assert torch.equal(base, gaps)
    return o


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_of_tokens(device, dtype, index_dtype):
    """Slots that are read and written, that two sequences read, padding of both kinds, and what is no slot."""
    indices = torch.tensor([4, -1, 0, 4, 9], dtype=index_dtype, device=device)
    token_indices = [[7, -1, 8], [1, 2, 3], [5, 0, 6], [-7, 9, 2**31 - 1], [1, 2, 3]]
    token_indices = torch.tensor(token_indices, dtype=index_dtype, device=device)
    x = make_inputs(5, 3, 1, 2, 24, 40, dtype, device)
    bound = TOLERANCE[dtype].values
    check_token_states(x, make_pool(9, 2, 24, 40, device), indices, token_indices, bound, bound)


@pytest.mark.parametrize("indices", [None, [4, 0, -1, 3]])
def test_states_of_packed_tokens(device, indices):
    """An empty sequence, padding, tokens after the last sequence; the indices as a column of a table."""
    indices = None if indices is None else torch.tensor(indices, dtype=torch.int32, device=device)
    x = make_inputs(1, 9, 1, 2, 16, 16, device=device, cu_seqlens=[0, 3, 3, 5, 7])
    token_indices = torch.arange(5, 14, device=device).repeat_interleave(2).view(1, 9, 2)[..., 0]
    o = check_token_states(x, make_pool(14, 2, 16, 16, device), indices, token_indices, 1e-5, 1e-5)
    assert not o[:, 7:].any()


@pytest.mark.parametrize("layout", POOL_LAYOUTS)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_tokens_in_a_strided_pool(device, layout, pool_dtype):
    """Wide tiles with padding. What goes on is fp32 where the pool is not."""
    pool = strided(make_pool(5, 2, 20, 72, device, pool_dtype), layout)
    assert not pool.is_contiguous()
    token_indices = torch.tensor([[3, 1, 0, 2]], dtype=torch.int32, device=device)
    bound = 1e-5 if pool_dtype == torch.float32 else torch.finfo(pool_dtype).eps / 2
    x, indices = make_inputs(1, 4, 1, 2, 20, 72, device=device), torch.tensor([1], device=device)
    check_token_states(x, pool, indices, token_indices, 1e-5, bound)
