"""``recurrent_gated_delta_rule_``: reads and writes a pool of states in place, and never touches another slot."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from tests.oracle import DEVICES, TOLERANCE, assert_close, expected, make_inputs

pytestmark = pytest.mark.parametrize("device", DEVICES)


def make_pool(P, HV, K, V, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(P, HV, K, V, generator=generator, dtype=torch.float64).to(device, dtype)


def make(B, T, dtype=torch.float32, device="cpu", **more):
    x = make_inputs(B, T, 2, 4, 32, 24, dtype, device, **more)
    x.pop("initial_state")
    return x


def check(x, pool, indices, dtype, **flags):
    """Runs in place on ``pool`` and compares outputs, the slots named, and every other slot bit for bit."""
    before = pool.clone()
    o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=indices, **flags)
    cu_seqlens = x["cu_seqlens"]
    N = x["q"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    slots = list(range(N)) if indices is None else indices.tolist()
    want = expected({**x, "initial_state": before[[max(s, 0) for s in slots]]})
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    for n, slot in enumerate(slots):
        rows = (n,) if bounds is None else (0, slice(bounds[n], bounds[n + 1]))
        if slot == -1:
            assert not o[rows].any()
        else:
            assert_close(o[rows], want["o"][rows], TOLERANCE[dtype].values, f"o of sequence {n}")
            assert_close(pool[slot], want["final_state"][n], TOLERANCE[dtype].values, f"slot {slot}")
    untouched = [p for p in range(len(pool)) if p not in slots]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_slots(device, dtype, T):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pool = make_pool(7, 4, 32, 24, device, wide)
    check(make(3, T, dtype, device), pool, torch.tensor([5, 0, 2], dtype=torch.int32, device=device), dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_minus_one_is_padding(device, index_dtype):
    indices = torch.tensor([-1, 3, -1, 0], dtype=index_dtype, device=device)
    check(make(4, 1, device=device), make_pool(5, 4, 32, 24, device), indices, torch.float32)


def test_all_padding(device):
    indices = torch.full((2,), -1, dtype=torch.int32, device=device)
    check(make(2, 2, device=device), make_pool(3, 4, 32, 24, device), indices, torch.float32)


def test_without_indices_the_first_slots_are_used(device):
    check(make(2, 1, device=device), make_pool(4, 4, 32, 24, device), None, torch.float32)


def test_packed_sequences_with_empty_and_padding(device):
    x = make(1, 12, device=device, cu_seqlens=[0, 4, 4, 5, 9, 12])
    indices = torch.tensor([3, 1, -1, 6, 0], dtype=torch.int32, device=device)
    check(x, make_pool(7, 4, 32, 24, device), indices, torch.float32)


def test_pool_inside_a_larger_cache(device):
    """A slice of a cache over layers, value-major: strides as they come, and the rest of the cache stays."""
    cache = make_pool(2 * 5 * 3, 4, 24, 32, device).unflatten(0, (2, 5, 3))
    before = cache.clone()
    pool = cache[1, :, 2].mT
    assert not pool.is_contiguous()
    check(make(2, 1, device=device), pool, torch.tensor([4, 1], device=device), torch.float32)
    changed = (cache != before).flatten(3).any(-1).nonzero().tolist()
    assert changed == [[1, 1, 2], [1, 4, 2]]


def test_state_v_first(device):
    x, indices = make(2, 3, device=device), torch.tensor([2, 0], device=device)
    pool = make_pool(3, 4, 32, 24, device)
    value_major = pool.mT.contiguous()
    o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=indices)
    o_v = gdn_ops.recurrent_gated_delta_rule_(**x, state=value_major, state_indices=indices, state_v_first=True)
    assert_close(o_v, o, 1e-6, "o")
    assert_close(value_major.mT, pool, 1e-6, "state")


def test_low_precision_pool(device):
    """A bf16 pool is read and written in bf16, computed in fp32."""
    x, pool = make(2, 1, torch.bfloat16, device), make_pool(3, 4, 32, 24, device, torch.bfloat16)
    check(x, pool, torch.tensor([2, 1], device=device), torch.bfloat16)


def test_equals_the_functional_twin(device):
    x, pool = make(3, 2, device=device), make_pool(3, 4, 32, 24, device)
    o, state = gdn_ops.recurrent_gated_delta_rule(**x, initial_state=pool.clone(), output_final_state=True)
    o_ = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool)
    assert_close(o_, o, 1e-6, "o")
    assert_close(pool, state, 1e-6, "state")


def test_flags_are_those_of_the_functional_form(device):
    x, pool = make(2, 1, device=device), make_pool(2, 4, 32, 24, device)
    flags = {
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True, "scale": 0.3, "A_log": torch.rand(4, device=device),
        "dt_bias": torch.rand(4, device=device),
    }  # fmt: skip
    o, state = gdn_ops.recurrent_gated_delta_rule(**x, **flags, initial_state=pool.clone(), output_final_state=True)
    o_ = gdn_ops.recurrent_gated_delta_rule_(**x, **flags, state=pool)
    assert_close(o_, o, 1e-6, "o")
    assert_close(pool, state, 1e-6, "state")


@pytest.mark.parametrize("bad", [-2, 3, 1000])
def test_out_of_range(device, bad):
    """An error on CPU, before anything is written; on CUDA padding, and no slot is corrupted."""
    x, pool = make(2, 1, device=device), make_pool(3, 4, 32, 24, device)
    before, indices = pool.clone(), torch.tensor([1, bad], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"state_indices must lie in \[-1, 3\)"):
            gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=indices)
        assert torch.equal(pool, before)
    else:
        o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=indices)
        assert not o[1].any() and o[0].any()
        assert torch.equal(pool[[0, 2]], before[[0, 2]]) and not torch.equal(pool[1], before[1])


def test_duplicate_slots_leave_the_others_alone(device):
    """On the CPU the slot ends with one of the results; on CUDA with anything finite."""
    x, pool = make(2, 1, device=device), make_pool(3, 4, 32, 24, device)
    want, before = expected({**x, "initial_state": pool[[1, 1]]})["final_state"], pool.clone()
    gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=torch.tensor([1, 1], device=device))
    assert torch.equal(pool[[0, 2]], before[[0, 2]]) and pool.isfinite().all()
    if device == "cpu":
        assert min((pool[1].double() - want[n]).abs().max() for n in range(2)) < 1e-5


def test_not_differentiable(device):
    """Autograd records nothing of the update (a pool that required grad would grow a graph token by token), and a
    backward pass through the output is refused."""
    x, pool = make(2, 1, device=device), make_pool(2, 4, 32, 24, device)
    x["v"].requires_grad_()
    o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool)
    assert not pool.requires_grad
    with pytest.raises(NotImplementedError, match="recurrent_gated_delta_rule_ has no gradient"):
        o.sum().backward()
