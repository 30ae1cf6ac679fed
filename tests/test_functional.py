"""The public functions: signatures, flags against their explicit composition, layouts, aliases, documentation."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import gdn_ops
from tests.oracle import (
    DEVICES,
    TOLERANCE,
    assert_all_close,
    assert_close,
    cotangents,
    make_inputs,
    make_inputs_of,
    run_with_gradients,
)

RULES = [gdn_ops.chunk_gated_delta_rule, gdn_ops.recurrent_gated_delta_rule]
LINEAR = [gdn_ops.chunk_gated_linear_attention, gdn_ops.recurrent_gated_linear_attention]
both_rules = pytest.mark.parametrize("function", RULES, ids=["chunk", "recurrent"])
every_rule = pytest.mark.parametrize(
    "function", RULES + LINEAR, ids=["chunk", "recurrent", "chunk_linear", "recurrent_linear"]
)
on_devices = pytest.mark.parametrize("device", DEVICES)

REQUIRED = inspect.Parameter.empty
RULE_SIGNATURE = {
    "q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "g": REQUIRED, "beta": REQUIRED, "scale": None, "initial_state": None,
    "output_final_state": False, "use_qk_l2norm_in_kernel": False, "use_gate_in_kernel": False, "A_log": None,
    "dt_bias": None, "use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False, "state_v_first": False,
    "cu_seqlens": None,
}  # fmt: skip


def signature(function):
    return {n: p.default for n, p in inspect.signature(function).parameters.items()}


@both_rules
def test_signature_is_the_designs(function):
    assert list(signature(function).items()) == list(RULE_SIGNATURE.items())
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in inspect.signature(function).parameters.values())


def test_signatures_of_the_others():
    in_place = {n: d for n, d in RULE_SIGNATURE.items() if n not in ("initial_state", "output_final_state")}
    pool = {"state": REQUIRED, "state_indices": None, "token_state_indices": None}
    assert signature(gdn_ops.recurrent_gated_delta_rule_) == {**in_place, **pool}
    names = list(signature(gdn_ops.recurrent_gated_delta_rule_))
    assert names[:7] == ["q", "k", "v", "g", "beta", "state", "state_indices"]
    assert names[-2:] == ["cu_seqlens", "token_state_indices"]
    assert signature(gdn_ops.causal_conv1d) == {
        "x": REQUIRED, "weight": REQUIRED, "bias": None, "initial_state": None, "output_final_state": False,
        "activation": None, "cu_seqlens": None,
    }  # fmt: skip
    assert signature(gdn_ops.causal_conv1d_update_) == {
        "x": REQUIRED, "state": REQUIRED, "weight": REQUIRED, "bias": None, "activation": None, "state_indices": None,
    }  # fmt: skip
    without = ("beta", *(n for n in RULE_SIGNATURE if n.startswith("use_")), "A_log", "dt_bias", "allow_neg_eigval")
    linear = [(n, d) for n, d in RULE_SIGNATURE.items() if n not in without]
    for function in LINEAR:
        assert list(signature(function).items()) == linear
    assert list(signature(gdn_ops.reference.gated_linear_attention)) == [
        "q", "k", "v", "g", "scale", "initial_state", "cu_seqlens",
    ]  # fmt: skip
    assert list(signature(gdn_ops.reference.gated_delta_rule)) == [
        "q", "k", "v", "g", "beta", "scale", "initial_state", "cu_seqlens",
    ]  # fmt: skip


def test_the_recurrent_form_has_its_other_name():
    assert gdn_ops.fused_recurrent_gated_delta_rule is gdn_ops.recurrent_gated_delta_rule


@both_rules
@on_devices
def test_flags_are_plain_torch_in_front_of_the_operator(function, device):
    """All flags at once, raw inputs with gradients, against the same thing written out by hand."""
    x = make_inputs(2, 70, 2, 4, 16, 24, device=device, initial_state=True)
    x.update(q=x["q"] * 3, k=x["k"] * 5, g=torch.randn_like(x["g"]) * 2, beta=torch.randn_like(x["beta"]) * 2)
    A_log, dt_bias = torch.randn(4, device=device), torch.randn(4, device=device)
    do, ds = cotangents(x)

    def composed(q, k, v, g, beta, initial_state, cu_seqlens, output_final_state):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        g = -A_log.exp() * F.softplus(g + dt_bias)
        return function(q, k, v, g, 2 * beta.sigmoid(), None, initial_state, output_final_state)

    flags = {
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias,
        "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True,
    }  # fmt: skip
    got, want = run_with_gradients(function, x, do, ds, **flags), run_with_gradients(composed, x, do, ds)
    assert_all_close(got, want, torch.float32)


FLAGS = {
    "l2norm": (
        {"use_qk_l2norm_in_kernel": True},
        lambda x: {n: x[n] / (x[n].square().sum(-1, keepdim=True) + 1e-6).sqrt() for n in ("q", "k")},
    ),
    "gate": (
        {"use_gate_in_kernel": True, "A_log": torch.tensor([0.1, -0.4])},
        lambda x: {"g": -torch.tensor([0.1, -0.4]).double().exp() * F.softplus(x["g"])},
    ),
    "gate_and_bias": (
        {"use_gate_in_kernel": True, "A_log": torch.tensor([0.1, -0.4]), "dt_bias": torch.tensor([0.5, -1.0])},
        lambda x: {
            "g": -torch.tensor([0.1, -0.4]).double().exp() * F.softplus(x["g"] + torch.tensor([0.5, -1.0]).double())
        },
    ),
    "sigmoid": ({"use_beta_sigmoid_in_kernel": True}, lambda x: {"beta": x["beta"].sigmoid()}),
    "neg_eigval": (
        {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
        lambda x: {"beta": 2 * x["beta"].sigmoid()},
    ),
}


@both_rules
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_flag_against_the_specification(function, flag, dtype):
    """Gates and betas in bf16 are widened before anything is done with them; the bound is the table's.

    The normalised q and k are rounded to their dtype once, as the layer would do it; twice the bound covers that.
    """
    flags, compose = FLAGS[flag]
    x = make_inputs(1, 70, 1, 2, 16, 24, dtype)
    x.update({n: x[n].to(dtype) for n in ("g", "beta")})
    o, state = function(**x, **flags, output_final_state=True)
    exact = {n: t.double() for n, t in x.items() if t is not None}
    want, want_state = gdn_ops.reference.gated_delta_rule(**{**exact, **compose(exact)})
    rounding = 2 if flag == "l2norm" and dtype == torch.bfloat16 else 1
    assert_close(o, want, rounding * TOLERANCE[dtype].values, "o")
    assert_close(state, want_state, rounding * TOLERANCE[dtype].values, "final_state")


@every_rule
def test_g_none_is_no_decay(function):
    x = make_inputs_of(function, 1, 70, 1, 2, 16, 24)
    o, _ = function(**{**x, "g": None})
    assert torch.equal(o, function(**{**x, "g": torch.zeros_like(x["g"])})[0])


@every_rule
@on_devices
def test_state_v_first_transposes_states_and_nothing_else(function, device):
    x = make_inputs_of(function, 2, 70, 2, 4, 16, 24, device=device, initial_state=True)
    o, state = function(**x, output_final_state=True)
    x["initial_state"] = x["initial_state"].mT.contiguous()
    o_v, state_v = function(**x, output_final_state=True, state_v_first=True)
    assert state_v.shape == (2, 4, 24, 16)
    assert_close(o_v, o, 1e-6, "o")
    assert_close(state_v.mT, state, 1e-6, "final_state")


@every_rule
def test_default_scale_and_optional_state(function):
    x = make_inputs_of(function, 1, 5, 1, 2, 16, 24)
    o, state = function(**x)
    assert state is None
    assert torch.equal(o, function(**x, scale=0.25)[0])
    assert_close(function(**x, scale=0.5)[0], 2 * o, 1e-6, "o")


@every_rule
def test_low_precision_states_are_widened(function):
    x = make_inputs_of(function, 1, 5, 1, 2, 16, 24, torch.bfloat16, initial_state=True)
    x["initial_state"] = x["initial_state"].bfloat16()
    _, state = function(**x, output_final_state=True)
    assert state.dtype == torch.float32


def test_gradients_reach_the_gates_parameters():
    x = make_inputs(1, 70, 1, 2, 16, 24, torch.float64)
    A_log, dt_bias = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(A_log, dt_bias):
        return gdn_ops.chunk_gated_delta_rule(**x, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias)[0].sum()

    loss(A_log, dt_bias).backward()
    for parameter, moved in ((A_log, (1e-3, 0.0)), (dt_bias, (0.0, 1e-3))):
        high, low = (loss(A_log.detach() + s * moved[0], dt_bias.detach() + s * moved[1]) for s in (1, -1))
        assert parameter.grad.sum().item() == pytest.approx(((high - low) / 2e-3).item(), rel=1e-3)


def test_every_public_function_is_documented_with_an_example():
    for name in gdn_ops.__all__:
        thing = getattr(gdn_ops, name)
        if callable(thing):
            assert thing.__doc__, name
            assert ">>>" in thing.__doc__, f"{name}: no example"
            assert "raises" in thing.__doc__.lower(), name
