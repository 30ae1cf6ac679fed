"""Both forms of both rules against the specification, inside the numerics table: values and every gradient."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from tests.oracle import (
    DEVICES,
    TOLERANCE,
    assert_all_close,
    cotangents,
    expected,
    leaves,
    make_inputs_of,
    run_with_gradients,
)

FUNCTIONS = {
    "chunk": gdn_ops.chunk_gated_delta_rule,
    "recurrent": gdn_ops.recurrent_gated_delta_rule,
    "chunk_linear": gdn_ops.chunk_gated_linear_attention,
    "recurrent_linear": gdn_ops.recurrent_gated_linear_attention,
}
DTYPES = list(TOLERANCE)
pytestmark = [
    pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS),
    pytest.mark.parametrize("device", DEVICES),
]


def check(function, inputs, dtype=None, scale=None):
    do, ds = cotangents(inputs)
    got = run_with_gradients(function, inputs, do, ds, scale=scale)
    assert_all_close(got, expected(inputs, scale, do=do, ds=ds), dtype or inputs["q"].dtype)
    for name in inputs:
        if "d" + name in got:
            assert got["d" + name].dtype == inputs[name].dtype


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_dtypes(function, device, dtype, T):
    check(function, make_inputs_of(function, 2, T, 2, 4, 32, 24, dtype, device, initial_state=True))


@pytest.mark.parametrize("H, HV", [(1, 1), (3, 3), (2, 6), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_values_without_initial_state(function, device, dtype, H, HV):
    check(function, make_inputs_of(function, 2, 70, H, HV, 32, 24, dtype, device))


@pytest.mark.parametrize("K, V, T", [(24, 40, 130), (100, 36, 70), (1, 1, 66), (192, 384, 66), (256, 512, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_dimensions(function, device, dtype, K, V, T):
    check(function, make_inputs_of(function, 1, T, 1, 2, K, V, dtype, device, initial_state=True))


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_scale(function, device, scale):
    check(function, make_inputs_of(function, 1, 70, 1, 2, 32, 24, device=device), scale=scale)


@pytest.mark.parametrize(
    "bounds",
    [[0, 5, 5, 70, 134, 134, 200], [0, 0, 64, 128], [0, 1, 2, 66, 66], [0, 0]],
    ids=lambda b: "-".join(map(str, b)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(function, device, dtype, bounds):
    check(
        function,
        make_inputs_of(function, 1, bounds[-1], 2, 4, 32, 24, dtype, device, initial_state=True, cu_seqlens=bounds),
    )


def test_packed_sequences_int64_without_state(function, device):
    bounds = torch.tensor([0, 3, 100, 100])
    check(function, make_inputs_of(function, 1, 100, 1, 2, 32, 24, device=device, cu_seqlens=bounds))


def test_no_packed_sequences_at_all(function, device):
    x = make_inputs_of(function, 1, 0, 2, 4, 32, 24, device=device, initial_state=True, cu_seqlens=[0])
    o, state = function(**x, output_final_state=True)
    assert o.shape == (1, 0, 4, 24) and state.shape == (0, 4, 32, 24)


def _head_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _last_strided(x):
    return torch.stack([x, x * 0], dim=-1).flatten(-2)[..., ::2]


def _from_one_projection(x):
    q, k, v = (x[n] for n in "qkv")
    names = [n for n in ("g", "beta") if n in x]
    fused = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
    gates = torch.cat([*(x[n] for n in names), x["g"]], dim=-1).split(v.shape[2], dim=-1)
    q_, k_, v_ = fused.split([q[0, 0].numel(), k[0, 0].numel(), v[0, 0].numel()], dim=-1)
    return {
        "q": q_.unflatten(2, q.shape[2:]), "k": k_.unflatten(2, k.shape[2:]), "v": v_.unflatten(2, v.shape[2:]),
        **dict(zip(names, gates)),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["one_projection", "head_first", "last_strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_as_they_come(function, device, dtype, layout):
    x = make_inputs_of(function, 2, 70, 2, 4, 32, 24, dtype, device, initial_state=True)
    x["initial_state"] = x["initial_state"].mT.contiguous().mT
    if layout == "one_projection":
        x.update(_from_one_projection(x))
    else:
        change = _head_first if layout == "head_first" else _last_strided
        x.update({n: change(x[n]) for n in ("q", "k", "v", "g", "beta") if n in x})
    assert not any(x[n].is_contiguous() for n in ("q", "k", "v", "g", "beta", "initial_state") if n in x)
    check(function, x)


def test_expanded_cotangents(function, device):
    """``o.sum().backward()`` sends gradients of stride 0."""
    x = make_inputs_of(function, 1, 70, 1, 2, 32, 24, device=device, initial_state=True)
    do, ds = (torch.ones_like(c) for c in cotangents(x))
    y = leaves(x)
    o, state = function(**y, output_final_state=True)
    (o.sum() + state.sum()).backward()
    want = expected(x, do=do, ds=ds)
    got = {"o": o, "final_state": state, **{"d" + n: y[n].grad for n in y if y[n] is not None}}
    assert_all_close(got, want, torch.float32)


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gates_in_low_precision(function, device, gate_dtype):
    x = make_inputs_of(function, 1, 130, 1, 2, 32, 24, torch.bfloat16, device)
    x.update({n: x[n].to(gate_dtype) for n in ("g", "beta") if n in x})
    check(function, x)


def test_gradients_flow_through_either_result_alone(function, device):
    x = make_inputs_of(function, 1, 70, 1, 2, 32, 24, device=device, initial_state=True)
    do, ds = cotangents(x)
    y = leaves(x)
    o, state = function(**y, output_final_state=True)
    names = [n for n in y if y[n] is not None]
    for result, cotangent, want in (
        (o, do, expected(x, do=do, ds=ds * 0)),
        (state, ds, expected(x, do=do * 0, ds=ds)),
    ):
        grads = torch.autograd.grad(result, [y[n] for n in names], cotangent, retain_graph=True)
        got = {"d" + n: grad for n, grad in zip(names, grads)}
        if result is state:
            assert not got.pop("dq").any() and not want.pop("dq").any()
        assert_all_close(got, {n: want[n] for n in got}, torch.float32)


def test_only_some_inputs_require_gradients(function, device):
    x = make_inputs_of(function, 1, 70, 1, 2, 32, 24, device=device)
    do, ds = cotangents(x)
    x["v"].requires_grad_()
    o, state = function(**x)
    assert state is None
    o.backward(do)
    assert_all_close({"dv": x["v"].grad}, {"dv": expected(x, do=do, ds=ds * 0)["dv"]}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_gates_everywhere(function, device, dtype):
    """With g = -1e4 the past is gone, exactly: no NaN, and no trace of the state."""
    x = make_inputs_of(function, 1, 130, 1, 2, 32, 24, dtype, device, initial_state=True)
    x["g"] = torch.full_like(x["g"], -1e4)
    do, ds = cotangents(x)
    got = run_with_gradients(function, x, do, ds)
    want = expected(x, do=do, ds=ds)
    assert not got.pop("dinitial_state").any() and not want.pop("dinitial_state").any()
    assert got["dg"].abs().max() <= 1e-4 and not want.pop("dg").any()
    got.pop("dg")
    assert_all_close(got, want, dtype)
    o, state = function(**{**x, "initial_state": None}, output_final_state=True)
    assert torch.equal(o, got["o"]) and torch.equal(state, got["final_state"])


@pytest.mark.parametrize("gate", [-1e4, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_strong_gates_between_weak_ones(function, device, dtype, gate):
    """A strong gate must not cost the digits of the weak ones after it in the same chunk; -inf forgets all."""
    x = make_inputs_of(function, 1, 130, 1, 2, 32, 24, dtype, device, initial_state=True)
    x["g"][:, [3, 64, 100]] = gate
    check(function, x)


def repeated_keys(function, K, V, dtype, device, beta, seed):
    """The triangular system at its worst: one key written over and over, no forgetting."""
    x = make_inputs_of(function, 1, 130, 1, 2, K, V, dtype, device, initial_state=True, seed=seed)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    if "beta" in x:
        x["beta"] = torch.full_like(x["beta"], beta)
    x["g"] = torch.full_like(x["g"], -1e-6)
    return x


@pytest.mark.parametrize("beta", [0.999, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_identical_keys(function, device, dtype, seed, beta):
    """What a rounding of the inverse loses would be lost again with every token."""
    x = repeated_keys(function, 128, 64, dtype, device, beta, seed)
    o, final_state = function(**x, output_final_state=True)
    assert_all_close({"o": o, "final_state": final_state}, expected(x), dtype)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_repeated_identical_keys(function, device, dtype, seed):
    check(function, repeated_keys(function, 32, 24, dtype, device, 0.999, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_negative_eigenvalues(function, device, dtype):
    x = make_inputs_of(function, 1, 130, 1, 2, 32, 24, dtype, device, initial_state=True)
    if "beta" not in x:
        pytest.skip("nothing is erased")
    x["beta"] = x["beta"] * 2
    check(function, x)


def test_gradcheck(function, device):
    x = make_inputs_of(function, 1, 66, 1, 2, 2, 3, torch.float64, device, initial_state=True)
    names = [n for n in x if x[n] is not None]
    tensors = [x[n].requires_grad_() for n in names]

    def run(*tensors):
        return function(**dict(zip(names, tensors)), output_final_state=True)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def test_gradcheck_packed(function, device):
    x = make_inputs_of(function, 1, 5, 1, 1, 2, 2, torch.float64, device, initial_state=True, cu_seqlens=[0, 2, 2, 5])
    cu_seqlens = x.pop("cu_seqlens")
    tensors = [t.requires_grad_() for t in x.values()]

    def run(*tensors):
        return function(**dict(zip(x, tensors)), cu_seqlens=cu_seqlens, output_final_state=True)

    assert torch.autograd.gradcheck(run, tensors)
