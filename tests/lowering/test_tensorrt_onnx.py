"""ONNX files with TensorRT's plugins in them: the nodes, run by the reference evaluator with the specification in the
plugins' place; and the plugins that the parser asks for by name."""

from __future__ import annotations

import contextlib
import types

import gdn_ops.lowering.tensorrt.plugins as quick
import numpy as np
import pytest
import torch

from gdn_ops import reference
from tests import oracle
from tests.export import modules, onnx_exports
from tests.lowering import tensorrt_stand_in as stand_in
from tests.models.models import make, tokens

onnx = pytest.importorskip("onnx", minversion="1.23")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("triton", reason="Triton is not installed")

from gdn_ops.export import export_onnx, onnx_proof, parity  # noqa: E402
from gdn_ops.export.program import flatten_state  # noqa: E402
from gdn_ops.lowering.tensorrt import onnx_nodes, onnx_plugins  # noqa: E402


def as_launched(name, attributes, *inputs, outputs=None):
    """What a plugin kernel is to compute, by the specification, in its own dtypes."""
    wide = [x.double() for x in inputs]
    if name == "causal_conv1d":
        results = reference.causal_conv1d(*wide, activation="silu" if attributes["silu"] else None)
        results = [x.to(inputs[0].dtype) for x in results]
    else:
        results = reference.gated_delta_rule(*wide[:5], scale=attributes["scale"], initial_state=wide[5])
        results = [results[0].to(inputs[0].dtype), results[1].float()]
    for given, result in zip(outputs or (), results):
        assert given.is_contiguous() and given.shape == result.shape and given.dtype == result.dtype
        given.copy_(result)
    return outputs or results


def plugin_operator(plugin: str):
    """A plugin as an operator of onnx's reference evaluator."""
    from onnx.reference.op_run import OpRun

    def run(self, *inputs, scale=None, silu=None, plugin_namespace=None, plugin_version=None):
        assert (plugin_namespace, plugin_version) == ("gdn", "1")
        attributes = {"silu": silu} if plugin == "causal_conv1d" else {"scale": scale}
        results = as_launched(plugin, attributes, *(torch.from_numpy(np.array(x)) for x in inputs))
        return tuple(x.numpy() for x in results)

    return type(plugin, (OpRun,), {"op_domain": "gdn", "_run": run})


def evaluator(path):
    names = ("recurrent_gated_delta_rule", "chunk_gated_delta_rule", "causal_conv1d")
    operators = [onnx_proof._gather_elements(), *map(plugin_operator, names)]
    return onnx.reference.ReferenceEvaluator(str(path), new_ops=operators)


def plugin_nodes(path) -> list:
    found = []

    def visit(graph):
        for node in graph.node:
            found.extend([node] if node.domain == "gdn" else [])
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g)

    visit(onnx.load(str(path)).graph)
    return found


@torch.no_grad()
def test_a_language_model_decodes_by_the_recurrent_plugin_and_prefills_by_the_chunkwise(tmp_path):
    model, result = onnx_exports.language_model("portable")
    counts = onnx_nodes.with_plugins(result.files["model.onnx"], tmp_path / "model.onnx")
    assert counts == {
        "gdn::causal_conv1d": 2, "gdn::chunk_gated_delta_rule": 1, "gdn::recurrent_gated_delta_rule": 1,
    }  # fmt: skip
    loaded = onnx.load(str(tmp_path / "model.onnx"))
    assert not loaded.functions and {x.domain for x in loaded.opset_import} == {"", "gdn"}
    run, names = evaluator(tmp_path / "model.onnx"), ["input_ids", *flatten_state(model.init_state(1))]
    eager_state = model.init_state(2)
    state = [x.numpy() for x in flatten_state(eager_state).values()]
    outputs = [x.name for x in loaded.graph.output]
    for T in (33, 1):
        ids = tokens(2, T, seed=T)
        logits, *state = run.run(outputs, dict(zip(names, [ids.numpy(), *state])))
        eager, eager_state = model.prefill(ids, eager_state)
        got = [torch.from_numpy(np.array(x)) for x in (logits, *state)]
        errors = parity.compare(got, (eager, flatten_state(eager_state)), outputs)
        assert max(errors.values()) < 1e-5, (T, errors)


def test_16_bit_activations_reach_the_plugins_without_casts(tmp_path):
    model, result = onnx_exports.mixer("portable", torch.float16)
    path = tmp_path / "model.onnx"
    counts = onnx_nodes.with_plugins(result.files["model.onnx"], path)
    assert counts == {"gdn::causal_conv1d": 1, "gdn::chunk_gated_delta_rule": 1}
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    dtypes = {x.name: x.type.tensor_type.elem_type for x in (*inferred.graph.value_info, *inferred.graph.input)}
    dtypes |= {x.name: x.data_type for x in inferred.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes = {node.op_type: node for node in plugin_nodes(path)}
    conv, rule = nodes["causal_conv1d"], nodes["chunk_gated_delta_rule"]
    assert [dtypes[x] for x in conv.input] == [half] * 4
    assert [dtypes[x] for x in rule.input] == [half] * 3 + [full] * 3
    x, gates, state = modules.mixer_inputs(2, 40, torch.float16, seed=4)
    feeds = {"x": x, "gates.g": gates["g"], "gates.beta": gates["beta"], "state": state}
    outputs = [x.name for x in inferred.graph.output]
    got = evaluator(path).run(outputs, {name: value.numpy() for name, value in feeds.items()})
    with torch.no_grad():
        eager = model(x, gates, state)
    for value, name in zip(got, ("y", "state", "conv")):
        assert parity.error(torch.from_numpy(np.array(value)), eager[name]) < parity.TOLERANCE[torch.float16], name


def test_large_weights_stay_beside_the_file(tmp_path):
    _, result = onnx_exports.language_model("portable")
    onnx_nodes.with_plugins(result.files["model.onnx"], tmp_path / "model.onnx", "weights")
    assert (tmp_path / "weights").stat().st_size > 10 * (tmp_path / "model.onnx").stat().st_size / 100
    assert onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.initializer[0].external_data


def test_another_function_is_refused(tmp_path):
    text = (
        '<ir_version: 10, opset_import: ["" : 18, "gdn_ops" : 1]> f (float[1] x) => (float[1] y) {y = gdn_ops.New (x)}'
    )
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match="expected GatedDeltaRule or CausalConv1d in the domain gdn_ops, got New"):
        onnx_nodes.with_plugins(tmp_path / "model.onnx", tmp_path / "out.onnx")


class Named:
    """The parser's plugins over the stand-in, with memory on the CPU."""

    def __init__(self, monkeypatch, name: str, **fields):
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: stream)
        monkeypatch.setattr(quick, "view", lambda address, shape, dtype: address)
        monkeypatch.setattr("gdn_ops.lowering.tensorrt.kernels.launch", as_launched)
        self.trt = stand_in._native()
        self.codes = {name: code for code, name in quick.dtype_names(self.trt).items()}
        self.creator = onnx_plugins.creator(self.trt, name)
        packed = [self.trt.PluginField(key, np.array([value])) for key, value in fields.items() if key != "text"]
        texts = [self.trt.PluginField(k, np.frombuffer(v, np.uint8)) for k, v in fields.get("text", {}).items()]
        self.plugin = self.creator.create_plugin(name, [*packed, *texts], self.trt.TensorRTPhase.BUILD)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        def desc(x):
            dtype = self.codes[str(x.dtype).removeprefix("torch.")]
            return types.SimpleNamespace(type=dtype, dims=tuple(x.shape), format=self.trt.TensorFormat.LINEAR)

        descs = [desc(x) for x in inputs]
        shapes = self.plugin.get_output_shapes([list(x.dims) for x in descs], [], None)
        dtypes = self.plugin.get_output_data_types([x.type for x in descs])
        names = {code: name for name, code in self.codes.items()}
        outputs = [
            torch.full(list(shape), float("nan"), dtype=getattr(torch, names[x])) for shape, x in zip(shapes, dtypes)
        ]
        runtime = self.plugin.attach_to_context(None).clone()
        runtime.enqueue(descs, [desc(x) for x in outputs], list(inputs), outputs, 0, 7)
        return outputs


@pytest.fixture
def exprs(monkeypatch):
    """In the stand-in a shape is a list; TensorRT copies one in the same way."""
    monkeypatch.setattr(stand_in, "DimsExprs", list)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "scale"), [(1, 0.3), (40, 0.0)])
def test_linear_attention_is_the_standards(monkeypatch, exprs, T, scale, dtype):
    B, H, HV, K, V = 2, 2, 4, 8, 16
    inputs = oracle.make_inputs(B, T, H, HV, K, V, dtype, initial_state=True)
    fields = {"q_num_heads": np.int64(H), "kv_num_heads": np.int64(HV), "scale": np.float32(scale)}
    plugin = Named(monkeypatch, "LinearAttention", text={"update_rule": b"gated_delta\0"}, **fields)
    q, k, v, g, beta, state = (inputs[x] for x in ("q", "k", "v", "g", "beta", "initial_state"))
    o, after = plugin(q.flatten(2), k.flatten(2), v.flatten(2), state, g, beta)
    want = oracle.expected(inputs, scale=float(np.float32(scale)) or K**-0.5)
    oracle.assert_close(o.unflatten(-1, (HV, V)), want["o"], oracle.TOLERANCE[dtype].values, "output")
    oracle.assert_close(after, want["final_state"], oracle.TOLERANCE[dtype].values, "present_state")
    assert (o.dtype, after.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("activation", [b"none", b"silu"])
def test_causal_conv_with_state_is_the_standards(monkeypatch, exprs, activation):
    inputs = oracle.make_conv_inputs(2, 9, 12, 4, torch.float32, initial_state=True)
    plugin = Named(monkeypatch, "CausalConvWithState", text={"activation": activation})
    x, weight, bias, state = (inputs[name] for name in ("x", "weight", "bias", "initial_state"))
    y, after = plugin(x.transpose(1, 2).contiguous(), weight.unsqueeze(1), bias, state)
    wide = {name: value.double() for name, value in inputs.items() if value is not None}
    want = reference.causal_conv1d(**wide, activation="silu" if activation == b"silu" else None)
    oracle.assert_close(y.transpose(1, 2), want[0], 1e-6, "output")
    oracle.assert_close(after, want[1], 1e-6, "present_state")


def test_what_the_named_plugins_refuse_and_support(monkeypatch, exprs):
    inputs = oracle.make_inputs(1, 3, 1, 1, 8, 8, initial_state=True)
    q, k, v, g, beta, state = (inputs[x] for x in ("q", "k", "v", "g", "beta", "initial_state"))
    packed = (q.flatten(2), k.flatten(2), v.flatten(2), state, g, beta)
    heads = {"q_num_heads": np.int64(1), "kv_num_heads": np.int64(1)}
    plugin = Named(monkeypatch, "LinearAttention", text={"update_rule": b"delta"}, **heads)
    with pytest.raises(ValueError, match="update_rule: expected 'gated_delta', got 'delta'"):
        plugin(*packed)
    with pytest.raises(ValueError, match="LinearAttention: expected 6 inputs, got 4: leave none out"):
        plugin.plugin.configure_plugin([None] * 4, [])
    conv = oracle.make_conv_inputs(1, 3, 4, 4, initial_state=True)
    x, weight, bias, before = (conv[name] for name in ("x", "weight", "bias", "initial_state"))
    with pytest.raises(ValueError, match="activation: expected 'none' or 'silu', got 'gelu'"):
        Named(monkeypatch, "CausalConvWithState", text={"activation": b"gelu"})(
            x.transpose(1, 2).contiguous(), weight.unsqueeze(1), bias, before
        )
    full, half, names = plugin.trt.float32, plugin.trt.float16, quick.dtype_names(plugin.trt)

    def supported(*chosen):
        return onnx_plugins.supports(onnx_plugins.RULE_DTYPES, list(chosen), names)

    assert supported(half) and supported(half, half) and not supported(half, full)
    assert supported(half, half, half, full) and not supported(half, half, half, half)
    assert supported(half, half, half, full, full, full, half) and not supported(plugin.trt.int64)
    assert [x.name for x in plugin.creator.field_names] == list(onnx_plugins.FIELDS)
    kept = {x.name: x for x in plugin.plugin.get_fields_to_serialize()}
    assert kept["update_rule"].data == b"delta" and kept["q_num_heads"].data.tolist() == [1]


@torch.no_grad()
def test_gated_linear_attention_stays_a_function(tmp_path):
    """Mamba2's rule has no plugin: its body is in the file, beside the plugins of the others."""
    model = make("GM", torch.float32)
    result = export_onnx(model, tmp_path / "out")
    counts = onnx_nodes.with_plugins(result.files["model.onnx"], tmp_path / "model.onnx")
    assert counts.keys() == {"gdn::causal_conv1d", "gdn::chunk_gated_delta_rule", "gdn::recurrent_gated_delta_rule"}
    loaded = onnx.load(str(tmp_path / "model.onnx"))
    assert {x.name for x in loaded.functions} == {"GatedLinearAttention"}
    state, ids = model.init_state(2), tokens(2, 33)
    feeds = {"input_ids": ids.numpy(), **{name: x.numpy() for name, x in flatten_state(state).items()}}
    (logits,) = evaluator(tmp_path / "model.onnx").run(["logits"], feeds)
    assert parity.error(torch.from_numpy(np.array(logits)), model.prefill(ids, state)[0]) < 1e-5
