"""The ONNX standard's own node cases of ``LinearAttention`` and ``CausalConvWithState``, run through our operators.

The onnx package ships them as Python: each case is a node, its inputs, and the outputs that the standard expects. Their
layouts become ours like this:

=====================  ==========================================  =========================================
the standard           its shape                                   ours
=====================  ==========================================  =========================================
query, output          ``[B, T, q_num_heads * d]``                 ``[B, T, HV, d]``
key, value             ``[B, T, kv_num_heads * d]``                heads repeated for the queries that share them
decay, beta            ``[B, T, kv_num_heads]``, beta also ``1``   ``[B, T, HV]``
past and present_state ``[B, kv_num_heads, K, V]``                 ``[B, HV, K, V]``, equal within a group
scale                  0 stands for ``K ** -0.5``                  ``None``
input, output (conv)   ``[B, D, T]``                               ``[B, T, D]``
weight (conv)          ``[D, 1, W]``                               ``[D, W]``
=====================  ==========================================  =========================================

Most cases decay each key dimension at its own rate, which our operator does not: its gate is one number a head and a
token. A token's decay comes before everything else it does to the state, though, so such a case is run token by token,
its decay applied to the state outside and the rest, the delta rule, inside. The same cases are also run whole with one
decay a head, against the standard's reference evaluator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops import reference
from tests.oracle import TOLERANCE, assert_close

onnx = pytest.importorskip("onnx", minversion="1.23")
OPSET = 27


class Case(NamedTuple):
    """One node; ``inputs`` by the standard's names, absent ones left out; outputs as the standard expects them."""

    name: str
    node: onnx.NodeProto
    inputs: dict[str, np.ndarray]
    output: np.ndarray
    present_state: np.ndarray

    @property
    def attributes(self) -> dict[str, object]:
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.node.attribute}

    @property
    def rule(self) -> str:
        return self.attributes.get("update_rule", b"gated_delta").decode()


def shipped(operator: str, module: str) -> dict[str, Case]:
    """Every case of ``operator``, without its prefix: the module's functions called as onnx itself calls them."""
    source, found = importlib.import_module(f"onnx.backend.test.case.node.{module}"), {}

    def expect(node, inputs, outputs, name, **_):
        short = name.removeprefix(f"test_{module}_")
        found[short] = Case(short, node, dict(zip(filter(None, node.input), inputs)), *outputs)

    with mock.patch.object(source, "expect", expect):
        for name, function in vars(getattr(source, operator)).items():
            if name.startswith("export"):
                np.random.seed(seed=0)
                function.__func__()
    return found


ATTENTION = shipped("LinearAttention", "linear_attention")
CONVOLUTION = shipped("CausalConvWithState", "causal_conv_with_state")

ONE_DECAY = ["delta", "linear", "linear_t1_no_past", "gated_per_head_decay"]
KEY_DECAY = [
    "gated_delta", "gated_delta_beta_scalar", "gated_delta_gqa", "gated_delta_mqa", "decode_step", "prefill_with_past",
    "no_past_explicit_zeros", "explicit_scale", "fp16", "gated",
]  # fmt: skip
OTHER_WIDTHS = {"kernel_size_one": 1, "short_input_no_past_state": 5}
WIDTHS = [
    "basic", "with_bias", "with_past_state", "silu", "swish_alias", "decode_step", "with_bias_and_past_state",
    "silu_with_past_state", "b1_c1_degenerate", "fp16", "silu_fp16",
]  # fmt: skip


def test_every_shipped_case_is_run():
    """A newer onnx with more cases must be looked at."""
    assert sorted(ATTENTION) == sorted([*ONE_DECAY, *KEY_DECAY])
    assert sorted(CONVOLUTION) == sorted([*WIDTHS, *OTHER_WIDTHS])
    assert {ATTENTION[name].rule for name in ATTENTION} == {"linear", "gated", "delta", "gated_delta"}
    for name in ONE_DECAY:
        inputs, heads = ATTENTION[name].inputs, ATTENTION[name].attributes["kv_num_heads"]
        assert "decay" not in inputs or inputs["decay"].shape[2] == heads
    K = {name: ATTENTION[name].inputs["key"].shape[2] for name in KEY_DECAY}
    assert {name: ATTENTION[name].inputs["decay"].shape[2] for name in KEY_DECAY} == K


class Ours(NamedTuple):
    """A case in our layout; ``group`` queries share a state of the standard's."""

    tensors: dict[str, Tensor | None]
    scale: float | None
    group: int
    dtype: torch.dtype


def translated(case: Case) -> Ours:
    """As the table above says. ``g`` keeps a last axis of K if the case decays by key dimension."""
    x = {name: torch.from_numpy(value) for name, value in case.inputs.items()}
    heads, kv_heads = case.attributes["q_num_heads"], case.attributes["kv_num_heads"]
    group = heads // kv_heads

    def by_head(name: str, count: int) -> Tensor:
        return x[name].unflatten(2, (count, -1)).repeat_interleave(heads // count, dim=2)

    g = by_head("decay", kv_heads).float() if "decay" in x else None
    if g is not None and g.shape[3] == 1:
        g = g[..., 0]
    state = x["past_state"].repeat_interleave(group, dim=1).float() if "past_state" in x else None
    tensors = {"q": by_head("query", heads), "k": by_head("key", kv_heads), "v": by_head("value", kv_heads)}
    tensors |= {"g": g, "initial_state": state}
    if case.rule.endswith("delta"):
        tensors["beta"] = by_head("beta", x["beta"].shape[2])[..., 0].float()
    return Ours(tensors, case.attributes.get("scale") or None, group, x["query"].dtype)


def agrees(ours: Ours, o: Tensor, state: Tensor, output: np.ndarray, present_state: np.ndarray) -> None:
    """Values inside the numerics table; the copies of a state that a group shares must be one."""
    tolerance = TOLERANCE[ours.dtype].values
    assert_close(o.flatten(2), torch.from_numpy(output), tolerance, "output")
    copies = state.unflatten(1, (-1, ours.group))
    for n in range(ours.group):
        assert_close(copies[:, :, n], torch.from_numpy(present_state), tolerance, f"present_state of copy {n}")


def chunk(**x) -> tuple[Tensor, Tensor]:
    """The delta rule, or without ``beta`` gated linear attention; the same below."""
    rule = gdn_ops.chunk_gated_delta_rule if "beta" in x else gdn_ops.chunk_gated_linear_attention
    return rule(**x, output_final_state=True)


def recurrent(**x) -> tuple[Tensor, Tensor]:
    rule = gdn_ops.recurrent_gated_delta_rule if "beta" in x else gdn_ops.recurrent_gated_linear_attention
    return rule(**x, output_final_state=True)


def in_place(*, initial_state: Tensor | None, **x) -> tuple[Tensor, Tensor]:
    if "beta" not in x:
        pytest.skip("gated linear attention has no form on a pool of states")
    (B, _, HV, V), K = x["v"].shape, x["q"].shape[3]
    pool = torch.zeros(B, HV, K, V) if initial_state is None else initial_state.clone()
    return gdn_ops.recurrent_gated_delta_rule_(**x, state=pool), pool


def specification(**x) -> tuple[Tensor, Tensor]:
    """The reference takes one dtype and a gate."""
    scale = x.pop("scale")
    x["g"] = torch.zeros(x["v"].shape[:3]) if x["g"] is None else x["g"]
    rule = reference.gated_delta_rule if "beta" in x else reference.gated_linear_attention
    o, state = rule(**{n: None if y is None else y.double() for n, y in x.items()}, scale=scale)
    return o, state


FUNCTIONS = [chunk, recurrent, in_place, specification]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ONE_DECAY)
def test_a_rule_of_ours_as_shipped(name, function):
    ours = translated(ATTENTION[name])
    agrees(ours, *function(**ours.tensors, scale=ours.scale), ATTENTION[name].output, ATTENTION[name].present_state)


def token_by_token(function: Callable, ours: Ours) -> tuple[Tensor, Tensor]:
    """The state decays outside, by key dimension; the delta rule is the operator's, at one token a call."""
    x, outputs = ours.tensors, []
    (B, T, HV, V), K = x["v"].shape, x["q"].shape[3]
    state = torch.zeros(B, HV, K, V) if x["initial_state"] is None else x["initial_state"]
    for t in range(T):
        token = {name: x[name][:, t : t + 1] for name in ("q", "k", "v", "beta") if name in x}
        state = state * x["g"][:, t, :, :, None].exp()
        o, state = function(**token, g=None, initial_state=state, scale=ours.scale)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", KEY_DECAY)
def test_a_decay_by_key_dimension_outside_the_operator(name, function):
    ours = translated(ATTENTION[name])
    agrees(ours, *token_by_token(function, ours), ATTENTION[name].output, ATTENTION[name].present_state)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", KEY_DECAY)
def test_one_decay_a_head(name, function):
    """The same node with each head's mean decay, which the standard also takes; its reference evaluator expects."""
    case = ATTENTION[name]
    heads = case.attributes["kv_num_heads"]
    decay = case.inputs["decay"]
    mean = decay.reshape(*decay.shape[:2], heads, -1).mean(-1, dtype=np.float32).astype(decay.dtype)
    case = case._replace(inputs={**case.inputs, "decay": mean})
    ours = translated(case)
    agrees(ours, *function(**ours.tensors, scale=ours.scale), *evaluated(case))


def evaluated(case: Case) -> list[np.ndarray]:
    """The outputs of the case's node by onnx's reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    def described(values: dict[str, np.ndarray]) -> list:
        kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in values.items()}
        return [onnx.helper.make_tensor_value_info(name, kinds[name], x.shape) for name, x in values.items()]

    outputs = dict(zip(case.node.output, (case.output, case.present_state)))
    graph = onnx.helper.make_graph([case.node], case.name, described(case.inputs), described(outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, case.inputs)


def convolution(case: Case) -> dict[str, object]:
    """The arguments of :func:`gdn_ops.causal_conv1d`."""
    x = {name: torch.from_numpy(value) for name, value in case.inputs.items()}
    activation = case.attributes.get("activation", b"none").decode()
    return {
        "x": x["input"].mT,
        "weight": x["weight"][:, 0],
        "bias": x.get("bias"),
        "initial_state": x.get("past_state"),
        "activation": None if activation == "none" else activation,
    }


@pytest.mark.parametrize("name", WIDTHS)
def test_convolution(name):
    case = CONVOLUTION[name]
    x = convolution(case)
    y, state = gdn_ops.causal_conv1d(**x, output_final_state=True)
    tolerance = TOLERANCE[y.dtype].values
    assert_close(y.mT, torch.from_numpy(case.output), tolerance, "output")
    assert torch.equal(state, torch.from_numpy(case.present_state))


@pytest.mark.parametrize("name", WIDTHS)
def test_convolution_in_place(name):
    case = CONVOLUTION[name]
    x = convolution(case)
    (B, _, D), W = x["x"].shape, x["weight"].shape[1]
    start = x.pop("initial_state")
    pool = torch.zeros(B, D, W - 1, dtype=x["x"].dtype) if start is None else start.clone()
    y = gdn_ops.causal_conv1d_update_(**x, state=pool)
    assert_close(y.mT, torch.from_numpy(case.output), TOLERANCE[y.dtype].values, "output")
    assert torch.equal(pool, torch.from_numpy(case.present_state))


@pytest.mark.parametrize(("name", "width"), OTHER_WIDTHS.items())
def test_a_width_that_is_not_ours_is_refused(name, width):
    case = CONVOLUTION[name]
    assert case.inputs["weight"].shape[2] == width
    with pytest.raises(ValueError, match="weight: expected"):
        gdn_ops.causal_conv1d(**convolution(case))
