"""Which nodes torch-tensorrt is given plugins for, and with which arguments; its registry is a stand-in where it is not
installed."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from gdn_ops.lowering.tensorrt import converters
from torch.export import Dim

import gdn_ops


@pytest.fixture
def registry(monkeypatch):
    """torch-tensorrt's registry as far as the converters know it; gives what is in it."""
    found = {}

    def converter(key, **options):
        return lambda function: found.update({key: (function, options)})

    names = ("torch_tensorrt", "torch_tensorrt.dynamo", "torch_tensorrt.dynamo.conversion")
    made = {name: types.ModuleType(name) for name in names}
    made["torch_tensorrt"].__version__ = "2.11.0+cu130"
    made[names[2]].dynamo_tensorrt_converter = converter
    made[names[2]].ConverterPriority = types.SimpleNamespace(HIGH="high")
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(converters, "_given", lambda ctx, value, name: value)
    monkeypatch.setattr(converters, "_dtype_name", lambda x: str(x.dtype).removeprefix("torch."))
    monkeypatch.setattr(
        converters.plugins, "add_plugin", lambda net, name, inputs, attributes: (name, inputs, attributes)
    )
    converters.register.__wrapped__()
    return found


class Rule(torch.nn.Module):
    def __init__(self, recurrent=False, **options):
        super().__init__()
        self.function = gdn_ops.recurrent_gated_delta_rule if recurrent else gdn_ops.chunk_gated_delta_rule
        self.options = options

    def forward(self, q, k, v, g, beta, state=None):
        return self.function(q, k, v, g, beta, initial_state=state, scale=0.5, **self.options)


class Conv(torch.nn.Module):
    def forward(self, x, weight, bias=None, state=None):
        return gdn_ops.causal_conv1d(x, weight, bias, state, activation="silu", output_final_state=True)


def node_of(module, inputs, shapes=None):
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    (node,) = [x for x in program.graph.nodes if str(x.target).startswith("gdn.")]
    return node


def rule_tensors(B=2, T=8, dtype=torch.bfloat16, state=torch.float32):
    q, v, gates = torch.randn(B, T, 2, 16, dtype=dtype), torch.randn(B, T, 4, 16, dtype=dtype), -torch.rand(B, T, 4)
    return (q, q, v, gates, -gates, *((torch.randn(B, 4, 16, 16, dtype=state),) if state else ()))


def test_every_operator_has_a_converter(registry):
    assert set(registry) == {
        torch.ops.gdn.chunk_gated_delta_rule.default, torch.ops.gdn.recurrent_gated_delta_rule.default,
        torch.ops.gdn.causal_conv1d.default,
    }  # fmt: skip
    assert all(x["supports_dynamic_shapes"] and x["priority"] == "high" for _, x in registry.values())


@pytest.mark.parametrize(("T", "plugin"), [(1, "recurrent_gated_delta_rule"), (8, "chunk_gated_delta_rule")])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_rule_node_becomes_the_plugin_of_its_length(registry, T, plugin, recurrent):
    node = node_of(Rule(recurrent, output_final_state=True), rule_tensors(T=T))
    function, options = registry[node.target]
    assert options["capability_validator"](node, None)
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args]
    name, inputs, attributes = function(types.SimpleNamespace(net=None), node.target, values, {}, "n")
    assert (name, attributes) == (plugin, {"scale": 0.5})
    assert [tuple(x.shape) for x in inputs] == [tuple(x.shape) for x in rule_tensors(T=T)]


def test_an_absent_state_or_bias_becomes_zeros(registry):
    ctx = types.SimpleNamespace(net=None)
    node = node_of(Rule(), rule_tensors(state=None))
    function, options = registry[node.target]
    assert options["capability_validator"](node, None)
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args]
    _, inputs, _ = function(ctx, node.target, values, {}, "n")
    assert torch.equal(inputs[5], torch.zeros(2, 4, 16, 16))
    node = node_of(Conv(), (torch.randn(2, 5, 12).half(), torch.randn(12, 4).half()))
    function, options = registry[node.target]
    assert options["capability_validator"](node, None)
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args]
    name, inputs, attributes = function(ctx, node.target, values, {}, "n")
    assert name == "causal_conv1d" and attributes == {"silu": True}
    assert torch.equal(inputs[2], torch.zeros(12).half()) and torch.equal(inputs[3], torch.zeros(2, 12, 3).half())


def test_what_stays_with_torch(registry):
    batch = {0: Dim("batch", min=1), 1: Dim("T", min=1)}
    takes = converters.takes_rule
    assert takes(node_of(Rule(output_final_state=True), rule_tensors(), (*[batch] * 5, {0: batch[0]})))
    assert not takes(node_of(Rule(), rule_tensors(state=None), (batch,) * 5)), "zeros of a batch that is not known"
    assert not takes(node_of(Rule(), rule_tensors(dtype=torch.float64, state=None)))
    packed = Rule(cu_seqlens=torch.tensor([0, 3, 8]))
    assert not takes(node_of(packed, rule_tensors(B=1, state=None)))
    conv = node_of(Conv(), (torch.randn(2, 5, 12).double(), torch.randn(12, 4).double()))
    assert not converters.takes_conv(conv)


@pytest.mark.parametrize(("version", "refused"), [("2.10.1", True), ("2.11.0", False), ("3.0.0.dev1", False)])
def test_versions(registry, monkeypatch, version, refused):
    monkeypatch.setattr(sys.modules["torch_tensorrt"], "__version__", version)
    outcome = (
        pytest.raises(ValueError, match=r"torch_tensorrt: expected 2\.11 or later")
        if refused
        else contextlib.nullcontext()
    )
    with outcome:
        converters.register.__wrapped__()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ModuleNotFoundError, match=r"converters need torch_tensorrt: pip install 'gdn-ops\[tensorrt\]'"):
        converters.register.__wrapped__()
