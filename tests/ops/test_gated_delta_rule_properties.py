"""Properties that hold whatever the numbers are: the two forms agree, splitting and packing change nothing, nothing
leaks, and the same inputs give the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch

import gdn_ops
from tests.oracle import (
    DEVICES,
    TOLERANCE,
    assert_all_close,
    assert_close,
    cotangents,
    make_inputs_of,
    run_with_gradients,
)

TOKENS = ("q", "k", "v", "g", "beta")
RULES = {
    "delta": (gdn_ops.chunk_gated_delta_rule, gdn_ops.recurrent_gated_delta_rule),
    "linear": (gdn_ops.chunk_gated_linear_attention, gdn_ops.recurrent_gated_linear_attention),
}
FUNCTIONS = {f"{form}_{rule}": f for rule, two in RULES.items() for form, f in zip(("chunk", "recurrent"), two)}
DTYPES = list(TOLERANCE)
pytestmark = pytest.mark.parametrize("device", DEVICES)
both_forms = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
both_rules = pytest.mark.parametrize("chunk, recurrent", RULES.values(), ids=RULES)


def part(inputs, tokens, initial_state=None):
    return {**{n: inputs[n][:, tokens] for n in TOKENS if n in inputs}, "initial_state": initial_state}


@both_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_is_recurrent(device, dtype, chunk, recurrent):
    x = make_inputs_of(chunk, 2, 150, 2, 4, 32, 24, dtype, device, initial_state=True)
    do, ds = cotangents(x)
    by_chunk, by_token = (run_with_gradients(f, x, do, ds) for f in (chunk, recurrent))
    assert_all_close(by_chunk, by_token, dtype)


@both_forms
@pytest.mark.parametrize("at", [1, 63, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_is_whole(function, device, dtype, at):
    x = make_inputs_of(function, 2, 150, 2, 4, 32, 24, dtype, device, initial_state=True)
    do, ds = cotangents(x)

    def in_two(initial_state, cu_seqlens, output_final_state, **tokens):
        first, state = function(**part(tokens, slice(0, at), initial_state), output_final_state=True)
        second, state = function(**part(tokens, slice(at, None), state), output_final_state=True)
        return torch.cat([first, second], dim=1), state

    assert_all_close(run_with_gradients(in_two, x, do, ds), run_with_gradients(function, x, do, ds), dtype)


@both_rules
def test_prefill_then_decode_is_whole(device, chunk, recurrent):
    x = make_inputs_of(chunk, 2, 70, 2, 4, 32, 24, device=device)
    want, want_state = chunk(**x, output_final_state=True)
    o, state = chunk(**part(x, slice(0, 65)), output_final_state=True)
    outputs = [o]
    for t in range(65, 70):
        o, state = recurrent(**part(x, slice(t, t + 1), state), output_final_state=True)
        outputs.append(o)
    assert_close(torch.cat(outputs, dim=1), want, 1e-5, "o")
    assert_close(state, want_state, 1e-5, "final_state")


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_separate(function, device, dtype):
    bounds = [0, 7, 7, 71, 135, 200]
    x = make_inputs_of(function, 1, 200, 2, 4, 32, 24, dtype, device, initial_state=True, cu_seqlens=bounds)
    do, ds = cotangents(x)

    def one_by_one(initial_state, cu_seqlens, output_final_state, **tokens):
        results = [
            function(**part(tokens, slice(a, b), initial_state[n : n + 1]), output_final_state=True)
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        outputs, states = zip(*results)
        return torch.cat(outputs, dim=1), torch.cat(states)

    assert_all_close(run_with_gradients(function, x, do, ds), run_with_gradients(one_by_one, x, do, ds), dtype)


@both_forms
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(function, device, dtype, packed):
    layout = {"B": 1, "cu_seqlens": [0, 30, 200]} if packed else {"B": 2}
    x = make_inputs_of(function, T=200, H=2, HV=4, K=32, V=24, dtype=dtype, device=device, initial_state=True, **layout)
    do, ds = cotangents(x)
    once, twice = (run_with_gradients(function, x, do, ds) for _ in range(2))
    assert all(torch.equal(once[n], twice[n]) for n in once)


@both_forms
def test_nothing_leaks_between_packed_sequences(function, device):
    """One sequence full of NaN leaves every bit of its neighbours as it was, gradients included."""
    x = make_inputs_of(function, 1, 160, 2, 4, 32, 24, device=device, initial_state=True, cu_seqlens=[0, 50, 90, 160])
    do, ds = cotangents(x)
    clean = run_with_gradients(function, x, do, ds)
    poisoned = {n: x[n].clone() for n in x}
    for name in (n for n in TOKENS if n in x):
        poisoned[name][:, 50:90] = float("nan")
    poisoned["initial_state"][1] = float("nan")
    dirty = run_with_gradients(function, poisoned, do, ds)
    for name in clean:
        per_sequence = name in ("final_state", "dinitial_state")
        for rows in (0, 2) if per_sequence else (slice(0, 50), slice(90, 160)):
            pick = rows if per_sequence else (slice(None), rows)
            assert torch.equal(clean[name][pick], dirty[name][pick]), name
    assert dirty["o"][:, 50:90].isnan().all()


@both_forms
def test_nothing_leaks_between_batch_rows_and_heads(function, device):
    x = make_inputs_of(function, 2, 70, 2, 4, 32, 24, device=device, initial_state=True)
    do, ds = cotangents(x)
    clean = run_with_gradients(function, x, do, ds)
    poisoned = {n: t if t is None else t.clone() for n, t in x.items()}
    poisoned["v"][1, :, 3] = float("nan")
    dirty = run_with_gradients(function, poisoned, do, ds)
    assert torch.equal(clean["o"][0], dirty["o"][0]) and torch.equal(clean["o"][1, :, :3], dirty["o"][1, :, :3])
    assert torch.equal(clean["dq"][0], dirty["dq"][0]) and torch.equal(clean["dq"][1, :, 0], dirty["dq"][1, :, 0])


@both_forms
def test_no_token_sees_the_future(function, device):
    x = make_inputs_of(function, 1, 130, 1, 2, 32, 24, device=device)
    o, _ = function(**x)
    changed = {n: t if t is None else t.clone() for n, t in x.items()}
    for name in (n for n in TOKENS if n in x):
        changed[name][:, 77:] *= 0.5
    o_changed, _ = function(**changed)
    assert torch.equal(o[:, :77], o_changed[:, :77])
    assert not torch.equal(o[:, 77:], o_changed[:, 77:])


@both_forms
def test_inputs_are_left_alone(function, device):
    x = make_inputs_of(function, 1, 70, 1, 2, 32, 24, device=device, initial_state=True)
    before = {n: t.clone() for n, t in x.items() if t is not None}
    run_with_gradients(function, x, *cotangents(x))
    o, state = function(**x, output_final_state=True)
    o.zero_(), state.zero_()
    assert all(torch.equal(x[n], before[n]) for n in before)


@both_forms
def test_a_second_derivative_is_refused_rather_than_wrong(function, device):
    """The operator's gradients are not themselves differentiable, and say so."""
    x = make_inputs_of(function, 1, 5, 1, 1, 4, 4, torch.float64, device)
    q = x["q"].requires_grad_()
    (dq,) = torch.autograd.grad(function(**x)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"chunk_gated_[a-z_]+_backward has no gradient"):
        torch.autograd.grad(dq.sum(), q)


@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_batch_mates(device, dtype, chunk, recurrent):
    """Alone, in a batch and packed between others, forward and backward, a sequence has the same bits."""
    # On CUDA alone in segments, in the batch whole and by other tiles, if it were not for the switch.
    B, T = (40, 600) if device == "cuda" else (5, 70)
    x = make_inputs_of(chunk, B, T, 1, 2, 32, 64, dtype, device, initial_state=True)
    do, ds = cotangents(x)
    row = slice(2, 3)
    alone = {n: t if t is None else t[row] for n, t in x.items()}
    packed = {n: t if n == "initial_state" or t is None else t.flatten(0, 1)[None] for n, t in x.items()}
    packed["cu_seqlens"] = torch.arange(B + 1, device=device) * T
    with gdn_ops.ops.batch_invariant():
        want = run_with_gradients(chunk, alone, do[row], ds[row])
        batch = run_with_gradients(chunk, x, do, ds)
        pack = run_with_gradients(chunk, packed, do.flatten(0, 1)[None], ds)
    for name, t in want.items():
        assert torch.equal(batch[name][row], t), name
        of_states = name in ("final_state", "dinitial_state")
        assert torch.equal((pack[name] if of_states else pack[name].unflatten(1, (B, T))[0])[row], t), name


def test_batch_invariance_ends_with_its_block(device):
    """Also after an error; and blocks nest."""
    from gdn_ops.kernels.batch_invariance import is_batch_invariant

    with pytest.raises(KeyError), gdn_ops.ops.batch_invariant():
        with gdn_ops.ops.batch_invariant():
            pass
        assert is_batch_invariant()
        raise KeyError
    assert not is_batch_invariant()
