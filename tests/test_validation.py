"""Bad input one by one: each error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from tests.oracle import make_conv_inputs, make_inputs, suited

RULES = {
    "chunk": gdn_ops.chunk_gated_delta_rule,
    "recurrent": gdn_ops.recurrent_gated_delta_rule,
    "chunk_linear": gdn_ops.chunk_gated_linear_attention,
    "recurrent_linear": gdn_ops.recurrent_gated_linear_attention,
}


def rule_inputs(**changes):
    return {**make_inputs(2, 5, 2, 4, 8, 6, initial_state=True), **changes}


def packed_inputs(bounds, T=5, **changes):
    x = make_inputs(1, T, 2, 4, 8, 6)
    return {**x, "cu_seqlens": torch.as_tensor(bounds), **changes}


BAD_RULE = {
    "q_not_a_tensor": (TypeError, r"q: expected a torch.Tensor, got list", {"q": [1.0]}),
    "q_none": (TypeError, r"q: expected a torch.Tensor, got NoneType", {"q": None}),
    "q_dims": (ValueError, r"q: expected 4 dimensions, got shape \(5, 8\)", {"q": torch.zeros(5, 8)}),
    "q_integer": (TypeError, r"q: expected dtype .*float16.*, got torch.int64", {"q": torch.zeros(2, 5, 2, 8).long()}),
    "k_dtype": (
        TypeError,
        r"k: expected dtype torch.float32 \(as q\), got torch.float16",
        {"k": torch.zeros(2, 5, 2, 8).half()},
    ),
    "v_dtype": (
        TypeError,
        r"v: expected dtype torch.float32 \(as q\), got torch.float64",
        {"v": torch.zeros(2, 5, 4, 6).double()},
    ),
    "k_length": (ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(2, 4, 2, 8\)", {"k": torch.zeros(2, 4, 2, 8)}),
    "k_features": (ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(2, 5, 2, 7\)", {"k": torch.zeros(2, 5, 2, 7)}),
    "k_heads": (ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(2, 5, 4, 8\)", {"k": torch.zeros(2, 5, 4, 8)}),
    "v_batch": (ValueError, r"v: expected shape \(2, 5, 4, 6\), got \(1, 5, 4, 6\)", {"v": torch.zeros(1, 5, 4, 6)}),
    "v_heads": (ValueError, r"v: expected a number of heads divisible by q's 2, got 3", {"v": torch.zeros(2, 5, 3, 6)}),
    "v_no_heads": (
        ValueError,
        r"v: expected a number of heads divisible by q's 2, got 0",
        {"v": torch.zeros(2, 5, 0, 6)},
    ),
    "v_features": (ValueError, r"v: expected at least one feature, got \(2, 5, 4, 0\)", {"v": torch.zeros(2, 5, 4, 0)}),
    "no_heads": (
        ValueError,
        r"q: expected at least one head",
        {"q": torch.zeros(2, 5, 0, 8), "k": torch.zeros(2, 5, 0, 8)},
    ),
    "g_heads": (ValueError, r"g: expected shape \(2, 5, 4\), got \(2, 5, 2\)", {"g": torch.zeros(2, 5, 2)}),
    "g_integer": (TypeError, r"g: expected dtype .*, got torch.int32", {"g": torch.zeros(2, 5, 4).int()}),
    "beta_dims": (ValueError, r"beta: expected 3 dimensions, got shape \(2, 5\)", {"beta": torch.zeros(2, 5)}),
    "beta_none": (TypeError, r"beta: expected a torch.Tensor, got NoneType", {"beta": None}),
    "beta_shape": (ValueError, r"beta: expected shape \(2, 5, 4\), got \(2, 6, 4\)", {"beta": torch.zeros(2, 6, 4)}),
    "device": (ValueError, r"k: expected device cpu \(as q\), got meta", {"k": torch.zeros(2, 5, 2, 8, device="meta")}),
    "gate_device": (
        ValueError,
        r"g: expected device cpu \(as q\), got meta",
        {"g": torch.zeros(2, 5, 4, device="meta")},
    ),
    "state_shape": (
        ValueError,
        r"initial_state: expected shape \(2, 4, 8, 6\), got \(2, 4, 6, 8\)",
        {"initial_state": torch.zeros(2, 4, 6, 8)},
    ),
    "state_v_first_shape": (
        ValueError,
        r"initial_state: expected shape \(2, 4, 6, 8\), got \(2, 4, 8, 6\)",
        {"state_v_first": True},
    ),
    "state_batch": (
        ValueError,
        r"initial_state: expected shape \(2, 4, 8, 6\), got \(1, 4, 8, 6\)",
        {"initial_state": torch.zeros(1, 4, 8, 6)},
    ),
    "state_type": (
        TypeError,
        r"initial_state: expected a torch.Tensor, got float",
        {"initial_state": 0.0, "state_v_first": True},
    ),
    "gate_without_A_log": (
        ValueError,
        r"use_gate_in_kernel: expected g .* and A_log, got None",
        {"use_gate_in_kernel": True},
    ),
    "gate_without_g": (
        ValueError,
        r"use_gate_in_kernel: expected g .* and A_log, got None",
        {"use_gate_in_kernel": True, "g": None, "A_log": torch.zeros(4)},
    ),
    "A_log_shape": (
        ValueError,
        r"A_log: expected shape \(4,\), got \(2,\)",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(2)},
    ),
    "dt_bias_shape": (
        ValueError,
        r"dt_bias: expected shape \(4,\), got \(3,\)",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(4), "dt_bias": torch.zeros(3)},
    ),
    "A_log_unused": (
        ValueError,
        r"A_log, dt_bias: expected None unless use_gate_in_kernel=True",
        {"A_log": torch.zeros(4)},
    ),
    "dt_bias_unused": (
        ValueError,
        r"A_log, dt_bias: expected None unless use_gate_in_kernel=True",
        {"dt_bias": torch.zeros(4)},
    ),
    "neg_eigval_alone": (
        ValueError,
        r"allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True",
        {"allow_neg_eigval": True},
    ),
}

BAD_BOUNDS = {
    "batch": (ValueError, r"q: expected batch size 1 with cu_seqlens, got \(2, 5, 2, 8\)", None),
    "float": (TypeError, r"cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.float32", [0.0, 5.0]),
    "dims": (ValueError, r"cu_seqlens: expected 1 dimensions, got shape \(1, 2\)", [[0, 5]]),
    "empty": (ValueError, r"cu_seqlens: expected at least one element, got \(0,\)", torch.zeros(0, dtype=torch.int32)),
    "start": (ValueError, r"cu_seqlens: expected a non-decreasing list from 0 to T=5, got \[1, 5\]", [1, 5]),
    "end": (ValueError, r"cu_seqlens: expected a non-decreasing list from 0 to T=5, got \[0, 6\]", [0, 6]),
    "order": (
        ValueError,
        r"cu_seqlens: expected a non-decreasing list from 0 to T=5, got \[0, 4, 2, 5\]",
        [0, 4, 2, 5],
    ),
    "list": (TypeError, r"cu_seqlens: expected a torch.Tensor, got list", "a list"),
}


@pytest.mark.parametrize("function", RULES.values(), ids=RULES)
@pytest.mark.parametrize("case", BAD_RULE)
def test_rule(function, case):
    error, message, changes = BAD_RULE[case]
    if suited(function, changes).keys() != changes.keys():
        pytest.skip(f"the function takes no {' nor '.join(changes)}")
    with pytest.raises(error, match="^" + message):
        function(**suited(function, rule_inputs(**changes)))


@pytest.mark.parametrize("function", RULES.values(), ids=RULES)
@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_cu_seqlens(function, case):
    error, message, bounds = BAD_BOUNDS[case]
    if case == "batch":
        inputs = rule_inputs(cu_seqlens=torch.tensor([0, 5]), initial_state=None)
    elif case == "list":
        inputs = {**packed_inputs([0, 5]), "cu_seqlens": [0, 5]}
    else:
        inputs = packed_inputs(bounds)
    with pytest.raises(error, match="^" + message):
        function(**suited(function, inputs))


def test_packed_initial_state_is_one_a_sequence():
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \(2, 4, 8, 6\), got \(1, 4, 8, 6\)"):
        gdn_ops.chunk_gated_delta_rule(**packed_inputs([0, 2, 5], initial_state=torch.zeros(1, 4, 8, 6)))


BAD_POOL = {
    "state_type": (TypeError, r"state: expected a torch.Tensor, got NoneType", {"state": None}),
    "state_dims": (ValueError, r"state: expected 4 dimensions, got shape \(4, 8, 6\)", {"state": torch.zeros(4, 8, 6)}),
    "state_shape": (
        ValueError,
        r"state: expected shape \(3, 4, 8, 6\), got \(3, 4, 8, 8\)",
        {"state": torch.zeros(3, 4, 8, 8)},
    ),
    "state_device": (
        ValueError,
        r"state: expected device cpu \(as q\), got meta",
        {"state": torch.zeros(3, 4, 8, 6, device="meta")},
    ),
    "too_few_slots": (
        ValueError,
        r"state: expected at least 2 slots without state_indices, got 1",
        {"state": torch.zeros(1, 4, 8, 6)},
    ),
    "indices_length": (
        ValueError,
        r"state_indices: expected shape \(2,\), got \(3,\)",
        {"state_indices": torch.zeros(3).int()},
    ),
    "indices_dtype": (
        TypeError,
        r"state_indices: expected dtype torch.int32 or torch.int64, got torch.float32",
        {"state_indices": torch.zeros(2)},
    ),
    "indices_type": (TypeError, r"state_indices: expected a torch.Tensor, got list", {"state_indices": [0, 1]}),
    "token_indices_dims": (
        ValueError,
        r"token_state_indices: expected 2 dimensions, got shape \(2,\)",
        {"token_state_indices": torch.zeros(2).int()},
    ),
    "token_indices_shape": (
        ValueError,
        r"token_state_indices: expected shape \(2, 5\), got \(2, 4\)",
        {"token_state_indices": torch.zeros(2, 4).int()},
    ),
    "token_indices_dtype": (
        TypeError,
        r"token_state_indices: expected dtype torch.int32 or torch.int64, got torch.int16",
        {"token_state_indices": torch.zeros(2, 5).short()},
    ),
    "token_indices_type": (
        TypeError,
        r"token_state_indices: expected a torch.Tensor, got list",
        {"token_state_indices": [[0] * 5] * 2},
    ),
    "token_indices_device": (
        ValueError,
        r"token_state_indices: expected device cpu \(as q\), got meta",
        {"token_state_indices": torch.zeros(2, 5, device="meta").int()},
    ),
    "beta": (TypeError, r"beta: expected a torch.Tensor, got NoneType", {"beta": None}),
}


@pytest.mark.parametrize("case", BAD_POOL)
def test_pool(case):
    error, message, changes = BAD_POOL[case]
    inputs = rule_inputs(state=torch.zeros(3, 4, 8, 6))
    inputs.pop("initial_state")
    with pytest.raises(error, match="^" + message):
        gdn_ops.recurrent_gated_delta_rule_(**{**inputs, **changes})


BAD_CONV = {
    "x_type": (TypeError, r"x: expected a torch.Tensor, got NoneType", {"x": None}),
    "x_dims": (ValueError, r"x: expected 3 dimensions, got shape \(2, 5, 6, 1\)", {"x": torch.zeros(2, 5, 6, 1)}),
    "x_channels": (ValueError, r"x: expected shape \(2, 5, 6\), got \(2, 5, 7\)", {"x": torch.zeros(2, 5, 7)}),
    "x_integer": (TypeError, r"x: expected dtype .*, got torch.int64", {"x": torch.zeros(2, 5, 6).long()}),
    "weight_dims": (
        ValueError,
        r"weight: expected 2 dimensions, got shape \(6, 1, 4\)",
        {"weight": torch.zeros(6, 1, 4)},
    ),
    "weight_wide": (ValueError, r"weight: expected a width \(dim 1\) of 2 to 4, got 5", {"weight": torch.zeros(6, 5)}),
    "weight_narrow": (
        ValueError,
        r"weight: expected a width \(dim 1\) of 2 to 4, got 1",
        {"weight": torch.zeros(6, 1)},
    ),
    "weight_device": (
        ValueError,
        r"weight: expected device cpu \(as x\), got meta",
        {"weight": torch.zeros(6, 4, device="meta")},
    ),
    "bias_shape": (ValueError, r"bias: expected shape \(6,\), got \(4,\)", {"bias": torch.zeros(4)}),
    "bias_device": (
        ValueError,
        r"bias: expected device cpu \(as x\), got meta",
        {"bias": torch.zeros(6, device="meta")},
    ),
    "activation": (ValueError, r"activation: expected None, 'silu' or 'swish', got 'gelu'", {"activation": "gelu"}),
}


@pytest.mark.parametrize("case", BAD_CONV)
def test_causal_conv1d(case):
    error, message, changes = BAD_CONV[case]
    inputs = make_conv_inputs(2, 5, 6, 4)
    with pytest.raises(error, match="^" + message):
        gdn_ops.causal_conv1d(**{**inputs, **changes})
    state = torch.zeros(2, 6, 3)
    arguments = {**{n: inputs[n] for n in ("x", "weight", "bias")}, "state": state, **changes}
    with pytest.raises(error, match="^" + message):
        gdn_ops.causal_conv1d_update_(**arguments)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (
            ValueError,
            r"initial_state: expected shape \(2, 6, 3\), got \(2, 6, 4\)",
            {"initial_state": torch.zeros(2, 6, 4)},
        ),
        (TypeError, r"initial_state: expected a torch.Tensor, got int", {"initial_state": 0}),
        (ValueError, r"x: expected batch size 1 with cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
    ],
    ids=["state_shape", "state_type", "cu_seqlens"],
)
def test_causal_conv1d_states(error, message, changes):
    with pytest.raises(error, match="^" + message):
        gdn_ops.causal_conv1d(**{**make_conv_inputs(2, 5, 6, 4), **changes})


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, r"state: expected a torch.Tensor, got NoneType", {"state": None}),
        (ValueError, r"state: expected shape \(3, 6, 3\), got \(3, 6, 4\)", {"state": torch.zeros(3, 6, 4)}),
        (ValueError, r"state: expected at least 2 slots without state_indices, got 1", {"state": torch.zeros(1, 6, 3)}),
        (ValueError, r"state_indices: expected shape \(2,\), got \(1,\)", {"state_indices": torch.zeros(1).int()}),
        (TypeError, r"state_indices: expected dtype torch.int32 or torch.int64", {"state_indices": torch.zeros(2)}),
    ],
    ids=["state_type", "state_shape", "too_few_slots", "indices_length", "indices_dtype"],
)
def test_causal_conv1d_update(error, message, changes):
    x = make_conv_inputs(2, 1, 6, 4)
    arguments = {"x": x["x"][:, 0], "state": torch.zeros(3, 6, 3), "weight": x["weight"], **changes}
    with pytest.raises(error, match="^" + message):
        gdn_ops.causal_conv1d_update_(**arguments)


@pytest.mark.parametrize("case", ["k_heads", "g_heads", "state_shape", "A_log_unused"])
def test_the_compiler_reports_the_same(case):
    """The checks are traced: a bad shape fails while compiling, with the same words."""
    _, message, changes = BAD_RULE[case]
    compiled = torch.compile(lambda x: gdn_ops.chunk_gated_delta_rule(**x)[0], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=message):
        compiled(rule_inputs(**changes))
