"""``recurrent_gated_delta_rule_``: reads and writes a pool of states in place, and never touches another slot.

With ``token_state_indices`` it leaves the state after each token, as a run on the tokens up to there would.
"""

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


def up_to(x, n, t):
    """The tokens of sequence ``n`` up to its ``t``-th, alone; and where that token is in ``[B, T]``."""
    b, begin = (n, 0) if x["cu_seqlens"] is None else (0, int(x["cu_seqlens"][n]))
    alone = {name: y[b : b + 1, begin : begin + t + 1] for name, y in x.items() if name != "cu_seqlens"}
    return {**alone, "cu_seqlens": None}, (b, begin + t)


def check_tokens(x, pool, indices, token_indices, values, states, **flags):
    """Each token's output and slot against the specification on the tokens up to it, all other slots bit for bit.

    ``values`` bounds the outputs, ``states`` what is left in the pool, ``[P, HV, K, V]`` however ``flags`` lay it out.
    """
    before = pool.clone()
    if flags.get("state_v_first"):
        before = before.mT
    o = gdn_ops.recurrent_gated_delta_rule_(
        **x, state=pool, state_indices=indices, token_state_indices=token_indices, **flags
    )
    after = pool.mT if flags.get("state_v_first") else pool
    N = x["q"].shape[0] if x["cu_seqlens"] is None else len(x["cu_seqlens"]) - 1
    written = set()
    for n, slot in enumerate(range(N) if indices is None else indices.tolist()):
        T = x["q"].shape[1] if x["cu_seqlens"] is None else int(x["cu_seqlens"][n + 1] - x["cu_seqlens"][n])
        for t in range(T):
            prefix, at = up_to(x, n, t)
            if slot == -1:
                assert not o[at].any()
                continue
            want = expected({**prefix, "initial_state": before[slot : slot + 1]})
            assert_close(o[at], want["o"][0, -1], values, f"o of token {t} of sequence {n}")
            kept = int(token_indices[at])
            if kept != -1:
                assert_close(after[kept], want["final_state"][0], states, f"slot {kept}")
                written.add(kept)
    untouched = [p for p in range(len(after)) if p not in written]
    assert torch.equal(after[untouched], before[untouched])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_states_of_tokens(device, dtype, index_dtype):
    """Some kept and some not; the slot that is read stays; two sequences read one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, pool = make(3, 3, dtype, device), make_pool(9, 4, 32, 24, device, wide)
    indices = torch.tensor([5, 0, 5], dtype=index_dtype, device=device)
    token_indices = torch.tensor([[7, 2, 8], [-1, 4, -1], [-1, -1, 1]], dtype=index_dtype, device=device)
    check_tokens(x, pool, indices, token_indices, *[TOLERANCE[dtype].values] * 2)


@pytest.mark.parametrize("kept", [1, 2, -1])
def test_the_state_of_a_single_token(device, kept):
    """To another slot, to the one that is read, to none."""
    indices, token_indices = torch.tensor([2], device=device), torch.tensor([[kept]], device=device)
    check_tokens(make(1, 1, device=device), make_pool(3, 4, 32, 24, device), indices, token_indices, 1e-5, 1e-5)


def test_states_of_tokens_without_indices(device):
    token_indices = torch.tensor([[2, 3], [4, 5]], device=device)
    check_tokens(make(2, 2, device=device), make_pool(6, 4, 32, 24, device), None, token_indices, 1e-5, 1e-5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_token_may_name_the_slot_that_is_read(device, position):
    """The tokens after it do not read what it has written."""
    token_indices = torch.tensor([[0, 3, 4]], device=device)
    token_indices[0, position] = 1
    indices = torch.tensor([1], device=device)
    check_tokens(make(1, 3, device=device), make_pool(5, 4, 32, 24, device), indices, token_indices, 1e-5, 1e-5)


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 5, 9]], ids=["dense", "packed"])
def test_padding_leaves_no_states_of_tokens(device, bounds):
    """Nor do sequences without tokens, whose slots stay."""
    x = make(1 if bounds else 4, 9 if bounds else 2, device=device, cu_seqlens=bounds)
    indices = torch.tensor([4, 1, -1, 0], dtype=torch.int32, device=device)
    token_indices = torch.arange(5, 5 + x["q"][..., 0, 0].numel(), device=device).view(x["q"].shape[:2])
    check_tokens(x, make_pool(14, 4, 32, 24, device), indices, token_indices, 1e-5, 1e-5)


def test_tokens_of_no_sequence_leave_no_states(device):
    """The function's door keeps them out where it can look at the bounds; the operator makes zeros of them."""
    x, pool = make(1, 4, device=device, cu_seqlens=[0, 2]), make_pool(5, 4, 32, 24, device)
    before, token_indices = pool.clone(), torch.tensor([[1, 2, 3, 4]], device=device)
    tokens = [x[n] for n in ("q", "k", "v", "g", "beta")]
    o = torch.ops.gdn.recurrent_gated_delta_rule_(*tokens, pool, None, token_indices, x["cu_seqlens"], 1.0)
    assert o[:, :2].any(-1).all() and not o[:, 2:].any()
    assert (pool != before).flatten(1).any(1).tolist() == [False, True, True, False, False]


def test_states_of_tokens_in_a_larger_value_major_cache(device):
    """Strides as they come, and the rest of the cache stays."""
    cache = make_pool(2 * 6 * 3, 4, 24, 32, device).unflatten(0, (2, 6, 3))
    before = cache.clone()
    indices, token_indices = torch.tensor([4], device=device), torch.tensor([[1, -1, 3]], device=device)
    x = make(1, 3, device=device)
    check_tokens(x, cache[1, :, 2], indices, token_indices, 1e-5, 1e-5, state_v_first=True)
    changed = (cache != before).flatten(3).any(-1).nonzero().tolist()
    assert changed == [[1, 1, 2], [1, 3, 2]]


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_rounded_for_the_pool_is_not_what_goes_on(device, pool_dtype):
    """Outputs of fp32 tokens stay fp32's, from a state in 16 bits on; each state is rounded once."""
    token_indices = torch.tensor([[0, 1, 3, 4]], device=device)
    pool, indices = make_pool(5, 4, 32, 24, device, pool_dtype), torch.tensor([2], device=device)
    check_tokens(make(1, 4, device=device), pool, indices, token_indices, 1e-5, torch.finfo(pool_dtype).eps / 2)


def test_drafts_are_taken_up_to_the_last_accepted_one(device):
    """Two tokens accepted of three, then two more from the second's state: as four tokens in one go."""
    x, pool = make(1, 4, device=device), make_pool(5, 4, 32, 24, device)
    want = expected({**x, "initial_state": pool[:1].clone()})
    first, rest = ({n: t if n == "cu_seqlens" else t[:, s] for n, t in x.items()} for s in (slice(3), slice(2, 4)))
    drafts = torch.tensor([[1, 2, 3]], device=device)
    o = gdn_ops.recurrent_gated_delta_rule_(**first, state=pool, token_state_indices=drafts)
    o_rest = gdn_ops.recurrent_gated_delta_rule_(**rest, state=pool, state_indices=drafts[:, 1])
    assert_close(torch.cat([o[:, :2], o_rest], 1), want["o"], 1e-5, "o")
    assert_close(pool[2], want["final_state"][0], 1e-5, "state")


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_a_state_of_a_token_out_of_range(device, bad):
    """An error on CPU, before anything is written; on CUDA the state is not kept, and no slot is corrupted."""
    x, pool = make(1, 2, device=device), make_pool(4, 4, 32, 24, device)
    before, token_indices = pool.clone(), torch.tensor([[1, bad]], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"token_state_indices must lie in \[-1, 4\), got values from"):
            gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, token_state_indices=token_indices)
        assert torch.equal(pool, before)
    else:
        o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, token_state_indices=token_indices)
        assert o.any(-1).all() and not torch.equal(pool[1], before[1])
        assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]])


def test_not_differentiable(device):
    """Autograd records nothing of the update (a pool that required grad would grow a graph token by token), and a
    backward pass through the output is refused."""
    x, pool = make(2, 1, device=device), make_pool(2, 4, 32, 24, device)
    x["v"].requires_grad_()
    o = gdn_ops.recurrent_gated_delta_rule_(**x, state=pool)
    assert not pool.requires_grad
    with pytest.raises(NotImplementedError, match="recurrent_gated_delta_rule_ has no gradient"):
        o.sum().backward()


def test_an_empty_pool_serves_padding(device):
    x, pool = make(2, 1, device=device), make_pool(0, 4, 32, 24, device)
    slots = torch.full((2,), -1, device=device)
    assert not gdn_ops.recurrent_gated_delta_rule_(**x, state=pool, state_indices=slots).any()
    conv = torch.ones(2, 7, device=device), torch.zeros(0, 7, 3, device=device), torch.ones(7, 4, device=device)
    assert not gdn_ops.causal_conv1d_update_(*conv, state_indices=slots).any()


def test_a_pool_whose_slots_share_memory_is_refused(device):
    x, pool = make(2, 1, device=device), make_pool(1, 4, 32, 24, device).expand(2, -1, -1, -1)
    with pytest.raises(
        ValueError, match=r"state: expected a tensor with memory for each number, .*, got strides \(0, "
    ):
        gdn_ops.recurrent_gated_delta_rule_(**x, state=pool)
    conv = torch.zeros(1, 7, 3, device=device).expand(2, 7, 3)
    with pytest.raises(
        ValueError, match=r"state: expected a tensor with memory for each number, .*, got strides \(0, "
    ):
        gdn_ops.causal_conv1d_update_(torch.ones(2, 7, device=device), conv, torch.ones(7, 4, device=device))
